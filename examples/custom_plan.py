"""Runs a plan of one's own (custom_plan.yaml), and shows what each of its two ranks holds.

Check the plan first: `tpx plan check examples/custom_plan.yaml --model MODEL`, then
`tpx launch --nproc 2 examples/custom_plan.py MODEL`, or
`torchrun --nproc-per-node 2 examples/custom_plan.py MODEL`.
"""

import sys
from pathlib import Path

import tpx

plan = Path(__file__).with_name("custom_plan.yaml")
llm = tpx.LLM(sys.argv[1] if len(sys.argv) > 1 else None, tp_plan=plan)

[result] = llm.generate(["The"], tpx.SamplingParams(max_tokens=16))
if llm.worker.place.rank == 0:
    for rank in llm.report.ranks:
        print(f"rank {rank.rank} read {rank.bytes_read:,} bytes, holds {rank.bytes_held:,}")
    print(f"The{result.text}")
