"""The least time of a decode step: what it must read, at a plain read's rate in the same run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..llm import LLM
from ..plan.cost import Model, Step, step_bytes

LEAST = 1 << 28  # bytes of a plain read on a CPU, and four times the largest cache
ON_GPU = 1 << 30
ROUNDS = 10
UNITS = {"K": 1 << 10, "M": 1 << 20}


class Floor:
    """rate: bytes a second of the slowest rank, all of which read at the same time."""

    def __init__(self, llm: LLM):
        world = llm.groups["world"]
        mine = torch.tensor([read_rate(llm.device)], dtype=torch.float64, device=llm.device)
        self.rate = float(world.all_gather(mine, "bench.rate").min())
        prepared = llm.prepared
        dtype: Any = str(llm.dtype).removeprefix("torch.")
        spec = replace(prepared.spec, dtype=dtype)
        self.model = Model.of(spec, prepared.layout, prepared.index, prepared.family.collectives)
        self.plan, self.mesh = prepared.rank_plan(0), prepared.plan.mesh

    def step_bytes(self, batch: int, context: int) -> float:
        """Of a step of `batch` sequences, dealt to the dp groups, with `context` tokens each, on
        the busiest rank. Experts: as many as uniform routing is expected to touch."""
        sequences = -(-batch // self.mesh.dp)
        step = Step(sequences, batch, sequences, sequences, context)
        dispatch = self.plan.dispatch.decode
        return step_bytes(self.model, self.mesh, self.plan.cuts, dispatch, step)

    def step_seconds(self, batch: int, context: int) -> float:
        return self.step_bytes(batch, context) / self.rate


def read_rate(device: torch.device) -> float:
    """Bytes a second of a sum, by all threads, over more than any cache holds; the best round."""
    on_gpu = device.type == "cuda"
    nbytes = ON_GPU if on_gpu else max(LEAST, 4 * largest_cache())
    data = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


def largest_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the processor's largest cache; 0 where the kernel does not say."""
    found = [0]
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdecimal() and text[-1] in UNITS:
            found.append(int(text[:-1]) * UNITS[text[-1]])
    return max(found)
