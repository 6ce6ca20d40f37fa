"""Writes a few continuations, and streams one more.

`tpx launch examples/generate.py MODEL`, or
`torchrun --nproc-per-node 2 examples/generate.py MODEL`.
"""

import sys

import tpx

llm = tpx.LLM(sys.argv[1] if len(sys.argv) > 1 else None)  # None: what `--model` named
speaks = llm.worker.place.rank == 0  # every rank gets the same results; one prints

params = tpx.SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=1)
prompts = ["The", "A list of"]
for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True):
    if speaks:
        print(f"{prompt}{result.text}  [{result.finish_reason}]\n")

prompt = "In this"
if speaks:
    print(prompt, end="")
for piece in llm.stream(prompt, tpx.SamplingParams(max_tokens=32)):
    if speaks:
        print(piece, end="", flush=True)
if speaks:
    print()
