"""Bytes that several ranks of a node keep: one of them reads each, and gives the others theirs.

Every rank goes through the same rounds, so that each knows what all give and take, and no counts
are sent. Who reads what is decided in plan/once.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .comm import Group
from .plan.once import Round, Rounds
from .plan.spans import Copy, Span
from .read import Arena, Buffer, ReadStats, Ring, Source, fill, move, scatter
from .read.arena import empty

T = TypeVar("T")
ALIGNMENT = 8  # bytes; of a copy's pieces on their way, from where elements are copied and cast
NOTHING = Span("", 0, 0, ())


def load_shared(
    rounds: Rounds, source: Source, arena: Arena, group: Group, stats: ReadStats
) -> int:
    """Fills the arena with what the rounds give to this rank; -> bytes that came from others.

    All ranks of `group`, for which the rounds were planned in this order, call it alike. While one
    round is exchanged a thread reads the next. Beside the arena it takes two reads of memory on the
    host, and what a round gives and takes on the arena's device: at most group.size reads each.
    Raises CheckpointError where this rank cannot read; others wait for it until they are ended.
    """
    if not rounds.windows:
        return 0
    on_gpu = arena.device.type == "cuda"
    ring = Ring(2, rounds.most, pin=on_gpu)
    exchange = _Exchange(arena, group, rounds.most)
    came, me = 0, group.rank
    thread = ThreadPoolExecutor(1, thread_name_prefix="tpx-exchange")
    try:
        started = ((step, thread.submit(_read, step, me, source, ring)) for step in rounds)
        for step, job in _one_ahead(started):
            buffer, seconds = job.result()
            begin = time.perf_counter()
            came += exchange.run(step, buffer, ring)
            stats.copy_seconds += time.perf_counter() - begin
            stats.read_seconds += seconds
            kept = sum(copy.kept for gives in step.gives for copy in gives[me])
            stats.add(_read_of(step, me).nbytes, kept)
    finally:
        thread.shutdown(cancel_futures=True)
        stats.look_at_memory()
    if on_gpu:
        torch.cuda.current_stream(arena.device).synchronize()
    return came


class _Filled(NamedTuple):
    buffer: Buffer
    seconds: float


def _read(step: Round, me: int, source: Source, ring: Ring) -> _Filled:
    """This rank's read of the round, in a thread. The span has the copies of all ranks, so that an
    error knows whose byte it is."""
    mine = _read_of(step, me)
    copies = sorted((c for gives in step.gives[me] for c in gives), key=lambda c: c.source)
    buffer = ring.take()
    assert buffer is not None, "the ring is never closed"
    begin = time.perf_counter()
    fill(source, mine._replace(copies=tuple(copies)), [buffer.view[: mine.nbytes]])
    return _Filled(buffer, time.perf_counter() - begin)


def _read_of(step: Round, me: int) -> Span:
    return step.reads[me] or NOTHING


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each when the one after it has been made."""
    made = deque[T]()
    for item in items:
        made.append(item)
        if len(made) > 1:
            yield made.popleft()
    yield from made


class _Exchange:
    def __init__(self, arena: Arena, group: Group, most: int):
        self._arena, self._group = arena, group
        self._out, self._in = _Room(most, arena.device), _Room(most, arena.device)

    def run(self, step: Round, buffer: Buffer, ring: Ring) -> int:
        """Puts the round's bytes where they are held, and gives the buffer back; -> bytes that came
        from others."""
        arena, me = self._arena, self._group.rank
        mine = _read_of(step, me)
        read = buffer.data[: mine.nbytes].to(arena.device, non_blocking=True)  # CPU: no copy
        scatter(mine.copies, read, arena)
        gives = [copies if q != me else () for q, copies in enumerate(step.gives[me])]
        takes = [given[me] if r != me else () for r, given in enumerate(step.gives)]
        send, receive = [[_nbytes(copies) for copies in each] for each in (gives, takes)]
        packed, got = self._out.take(sum(send)), self._in.take(sum(receive))
        for copy, at in _laid(gives):
            move(copy._replace(target=at, target_step=copy.nbytes), read, packed)
        ring.give(buffer, _mark(read))
        self._group.all_to_all_into(got, packed, send, receive, "load.exchange")
        came = [copy._replace(source=at, source_step=copy.nbytes) for copy, at in _laid(takes)]
        scatter(came, got, arena)
        return sum(copy.kept for copy in came)


class _Room:
    """Memory that every round uses again: a backend may hold on to what it was given last."""

    def __init__(self, most: int, device: torch.device):
        self._most, self._data = most, empty(0, device)

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], not cleared."""
        if nbytes > len(self._data):
            self._data = empty(-(-nbytes // self._most) * self._most, self._data.device)
        return self._data[:nbytes]


def _mark(x: Tensor) -> torch.cuda.Event | None:
    """When all that has been asked of x's GPU until now is done."""
    return torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None


def _laid(parcels: Iterable[Iterable[Copy]]) -> Iterator[tuple[Copy, int]]:
    """Each copy of each rank's parcel, and the byte of the whole where its pieces lie, gapless."""
    at = 0
    for copies in parcels:
        for copy in copies:
            yield copy, at
            at += _room(copy)


def _nbytes(copies: Iterable[Copy]) -> int:
    return sum(map(_room, copies))


def _room(copy: Copy) -> int:
    return -(-copy.kept // ALIGNMENT) * ALIGNMENT
