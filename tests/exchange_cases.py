"""load_shared without process groups: threads stand for ranks, and bytes in memory for files."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from byte_plans import UNFILLED, Drawn

from tpx.exchange import load_shared
from tpx.plan.once import Round, plan_node
from tpx.plan.spans import Window
from tpx.read import Arena, ReadStats, load_spans

MOST = 4096


class Listed:
    """Rounds that a test writes out, as much of them as load_shared needs."""

    def __init__(self, steps: list[Round], most: int):
        self.steps, self.most, self.windows = steps, most, (Window("a", 0, 1),)

    def __iter__(self) -> Iterator[Round]:
        return iter(self.steps)


class Memory:
    """Files in memory, as a Source that reads at most `most` bytes at a time."""

    def __init__(self, files: dict[str, bytes], most: int = 1 << 30):
        self.files, self.most = files, most

    def preadv(self, file: str, buffers: Sequence[memoryview], offset: int) -> int:
        got = self.files[file][offset : offset + min(self.most, len(buffers[0]))]
        buffers[0][: len(got)] = got
        return len(got)


class Table:
    """Where threads that stand for ranks exchange what they have, one round after another."""

    def __init__(self, size: int):
        self.size, self.parts = size, [list[torch.Tensor]()] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def seat(self, rank: int) -> Any:
        return Seat(self, rank)


class Seat:
    """As much of a Group as load_shared needs."""

    def __init__(self, table: Table, rank: int):
        self.table, self.rank, self.size = table, rank, table.size

    def all_to_all_into(
        self, out: torch.Tensor, x: torch.Tensor, send: list[int], receive: list[int], name: str
    ) -> None:
        assert receive[self.rank] == 0, "what a rank keeps itself does not travel"
        self.table.parts[self.rank] = list(x.split(send))
        self.table.barrier.wait()
        came = [parts[self.rank] for parts in self.table.parts]
        assert [len(part) for part in came] == receive
        out.copy_(torch.cat(came))
        self.table.barrier.wait()


def blank(plan: Any, dtype: torch.dtype, device: str = "cpu") -> Arena:
    """An arena whose bytes say that nothing has been put there."""
    arena = Arena(plan, dtype, torch.device(device))
    for name in plan.shards:
        stored = bytes([UNFILLED]) * (arena.flat(name).numel() * arena.held[name].stored.itemsize)
        arena.flat(name).copy_(as_held(arena, name, stored))
    return arena


def as_held(arena: Arena, name: str, data: bytes) -> torch.Tensor:
    stored = (
        torch.frombuffer(bytearray(data), dtype=arena.held[name].stored) if data else torch.empty(0)
    )
    return stored.to(arena.held[name].final)


def bits(held: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """The bytes, with those of one NaN for any that was cast: a GPU gives it others than a CPU."""
    if held.dtype != stored:
        held = held.masked_fill(held.isnan(), torch.nan)
    return held.view(torch.uint8)


def check_drawn(case: Drawn, dtype: torch.dtype, short: int, device: str = "cpu") -> None:
    """Every rank of the case holds what it should, cast to dtype; reads are of `short` bytes."""
    world = len(case.plans)
    node = plan_node(case.plans, "always", most=MOST)
    table, sources = Table(world), [Memory(case.files, short) for _ in range(world)]

    def load(rank: int) -> tuple[Arena, ReadStats, int]:
        arena, stats = blank(case.plans[rank], dtype, device), ReadStats()
        load_spans(node.own[rank], sources[rank], arena, stats)
        came = load_shared(node.rounds, sources[rank], arena, table.seat(rank), stats)
        return arena, stats, came

    with ThreadPoolExecutor(world) as pool:
        loaded = list(pool.map(load, range(world)))
    for rank, (arena, stats, came) in enumerate(loaded):
        for name, data in case.expected[rank].items():
            found, wanted = arena.flat(name).cpu(), as_held(arena, name, data)
            stored = arena.held[name].stored
            assert torch.equal(bits(found, stored), bits(wanted, stored)), (rank, name)
        assert stats.bytes_read == node.bytes_read[rank]
        assert came == sum(
            copy.kept
            for step in node.rounds
            for giver, gives in enumerate(step.gives)
            for copy in gives[rank]
            if giver != rank
        )
