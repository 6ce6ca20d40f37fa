"""What test_gpu_ranks.py runs on every rank, under `tpx launch`.

Arguments: what to do, a checkpoint, a folder in which the first rank writes what was found, names.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import PARAMS, PROMPTS

import tpx
from tpx import SamplingParams
from tpx.comm import Group, Groups
from tpx.mesh import Mesh
from tpx.models.load import load_model
from tpx.plan.prepare import prepare
from tpx.worker import Worker

DEVICE = os.environ.get("TPX_TEST_DEVICE", "cuda")
GREEDY = SamplingParams(max_tokens=50, ignore_eos=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def open_llm(folder: str, plan: str, graphs: bool = True) -> tpx.LLM:
    return tpx.LLM(folder, plan, "float32", DEVICE, graphs=graphs, context=96, batch=8)


def generates(folder: str, out: Path | None, *names: str) -> None:
    """out: where the first rank writes a file for each name, as soon as it has it."""
    for name in names:
        plan, _, eager = name.partition(" ")
        with open_llm(folder, plan, not eager) as llm:
            with llm.groups.recording() as sent:
                logits = [one.tolist() for one in llm.logits(PROMPTS)]
            greedy, drawn = (llm.generate(PROMPTS, params) for params in (GREEDY, PARAMS))
            runner = llm.session.engine.runner
            found = {
                "logits": logits,
                "greedy": [one.token_ids for one in greedy],
                "drawn": [one.token_ids for one in drawn],
                "graphs": len(runner._steps) if runner.static else 0,
                "calls": sorted({record.name for record in sent}),
                "decode": llm.prepared.rank_plan(0).dispatch.decode,
            }
        if out is not None:
            (out / f"{name}.json").write_text(json.dumps(found))


def serves(folder: str, out: Path | None) -> None:
    async def serve(llm: tpx.LLM) -> list[list[int]]:
        async with tpx.AsyncEngine(llm) as engine:
            if not engine.leads:
                engine.follow()
                return []
            return await asyncio.gather(*(ask(engine, prompt) for prompt in PROMPTS))

    async def ask(engine: tpx.AsyncEngine, prompt: Any) -> list[int]:
        pieces = engine.generate(tpx.Request(prompt, GREEDY))
        return [token async for piece in pieces for token in piece.token_ids]

    with open_llm(folder, "tp2") as llm:
        found = asyncio.run(serve(llm))
    if out is not None:
        (out / "served.json").write_text(json.dumps(found))


left_open: list[tpx.LLM] = []


def leaves_open(folder: str, out: Path | None) -> None:
    """As a script that ends without closing what it opened."""
    left_open.append(open_llm(folder, "tp2"))
    left_open[0].generate(PROMPTS, GREEDY)


def exchanges(folder: str, out: Path | None) -> None:
    """Weights that one rank reads for both have the bits of those that each reads for itself."""
    prepared, worker = prepare(folder, "tp2-etp2", 2), Worker(DEVICE)
    groups = worker.groups(prepared.plan.mesh)
    placed = prepared.rank_plan(groups.rank), groups, torch.float32, worker.device
    shared, alone = (load_model(prepared, *placed, share=how) for how in ("always", "never"))
    assert not alone[1].bytes_received
    ours = dict(shared[0].named_parameters())
    same = [bool(torch.equal(ours[name], p)) for name, p in alone[0].named_parameters()]
    mine = torch.tensor([sum(same) == len(same) == len(ours), shared[1].bytes_received])
    told = groups["world"].all_gather(mine.to(worker.device), "told").view(2, 2).tolist()
    if out is not None:
        (out / "exchanged.json").write_text(json.dumps(told))
    groups.close()


def sends(folder: str, out: Path | None) -> None:
    """Every collective, in the types and shapes that a job has."""
    worker = Worker(DEVICE)
    groups = worker.groups(Mesh(tp=2, edp=2))
    wrong = [*wrong_sums(groups["tp"]), *wrong_moves(groups["tp"]), *wrong_bytes(groups)]
    told = groups["world"].gather_bytes(json.dumps(wrong).encode(), "told")
    if out is not None:
        (out / "sent.json").write_text(json.dumps([json.loads(one) for one in told]))
    groups.close()


def wrong_sums(tp: Group) -> list[str]:
    found, place = [], {"device": tp.device}
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = torch.arange(12, **place).to(dtype).view(3, 4) * (tp.rank + 1)
        both = torch.arange(12, **place).to(dtype).view(3, 4) * 3
        rows = both.t()[2 * tp.rank : 2 * tp.rank + 2]
        checks = {
            "all_reduce": torch.equal(tp.all_reduce(x, "sum"), both),
            "all_reduce, transposed": torch.equal(tp.all_reduce(x.t(), "sum"), both.t()),
            "reduce_scatter, transposed": torch.equal(tp.reduce_scatter(x.t(), "sum"), rows),
            "all_reduce of nothing": tp.all_reduce(x[:0], "sum").shape == (0, 4),
        }
        found += [f"{name} of {dtype}" for name, right in checks.items() if not right]
    return found


def wrong_moves(tp: Group) -> list[str]:
    found, me = [], tp.rank
    for dtype in DTYPES:
        every = (torch.arange(20, device=tp.device) % 3).to(dtype).view(10, 2)
        for first in (5, 7, 10, 0):  # rows of rank 0; rank 1 has the others
            sizes = [first, 10 - first]
            parts = every.split(sizes)
            whole = tp.all_gather(parts[me], "gather", sizes)
            counts = [[size - size // 3, size // 3] for size in sizes]  # of each rank, to each
            came = [counts[0][me], counts[1][me]]
            got = tp.all_to_all(parts[me], counts[me], came, "send")
            right = torch.cat([parts[r].split(counts[r])[me] for r in (0, 1)])
            if not torch.equal(whole, every) or not torch.equal(got, right):
                found.append(f"{first} of 10 rows of {dtype}")
        told = tp.broadcast((every, torch.zeros_like(every))[me], 0, "tell")
        if not torch.equal(told, every):
            found.append(f"broadcast of {dtype}")
    return found


def wrong_bytes(groups: Groups) -> list[str]:
    found, me = [], groups.rank
    for where, group in (("device", groups["world"]), ("host", groups.host("world"))):
        for lengths in ((3, 3), (0, 5), (100_000, 1), (0, 0)):
            every = [bytes([65 + r]) * lengths[r] for r in (0, 1)]
            told = group.gather_bytes(every[me], "gather")
            if told != every or group.broadcast_bytes(every[me], 1, "tell") != every[1]:
                found.append(f"{lengths} bytes on the {where}")
    return found


JOBS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (generates, serves, leaves_open, exchanges, sends)
}


if __name__ == "__main__":
    job, folder, out, *names = sys.argv[1:]
    JOBS[job](folder, Path(out) if os.environ["RANK"] == "0" else None, *names)
