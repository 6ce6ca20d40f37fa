"""Times launches as replays of a CUDA graph, and what the device's memory gives."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "torch-ext"))

# gpt-oss: (outputs, inputs) of the dense layers.
LAYERS = {"qkv": (5120, 2880), "o_proj": (2880, 4096), "router": (32, 2880)}
HEAD = {"lm_head": (201088, 2880)}
HEADS, KV, WIDTH, PAGE, WINDOW = 64, 8, 64, 16, 128


def graph_us(launches: Callable[[], object], replays: int = 15) -> float:
    """Median microseconds of one replay of a graph of everything that `launches` starts."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches()
        launches()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def read_rate() -> float:
    """Bytes a microsecond that a plain sum over 4 GiB reads."""
    data = torch.randn(1 << 30, device="cuda")
    return data.nbytes / graph_us(lambda: data.sum(), 10)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def weights(n: int, k: int, count: int) -> list[torch.Tensor]:
    """Different weights a layer, of unit outputs."""
    return [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(count)]


class Cache:
    """`count` layers of a cache that holds sequences of `lengths`, pages scattered."""

    def __init__(self, lengths: list[int], count: int, window: int | None = None):
        pages = [-(-n // PAGE) for n in lengths]
        kept = [min(p, (window or n) // PAGE + 2) for p, n in zip(pages, lengths, strict=False)]
        order = torch.randperm(sum(kept)).int()
        tables = torch.full((len(lengths), max(pages)), -1, dtype=torch.int32)
        used = 0
        for b, (p, live) in enumerate(zip(pages, kept, strict=False)):
            tables[b, p - live : p] = order[used : used + live]
            used += live
        last = [
            int(tables[b, (n - 1) // PAGE]) * PAGE + (n - 1) % PAGE for b, n in enumerate(lengths)
        ]
        self.slots = torch.tensor(last, device="cuda")
        self.tables, self.window = tables.cuda(), window
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        shape = (used, PAGE, KV, WIDTH)
        self.layers = [(random(*shape), random(*shape)) for _ in range(count)]
        self.sinks = random(HEADS)

    @property
    def lookup(self):
        return self.tables, self.lengths, self.sinks, self.window
