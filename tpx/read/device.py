"""Onto a GPU: threads fill the pieces of a page-locked buffer, and it is copied as one.

Copies are few and large: on an H100 each took 0.2 ms beside its bytes while 8 to 16 threads read,
whether it was of 1 MiB or of 8.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch

from ..plan.spans import Span
from .arena import Arena
from .batches import Batch, batches, copies_of
from .copies import scatter
from .readers import Fill, Job
from .ring import Buffer, Fence, Ring


class Copier(Protocol):
    def copy(self, batch: Batch, data: torch.Tensor) -> Fence | None:
        """Begins to put the batch's bytes where they are held; -> when `data` is done with."""
        ...


class _Filling:
    """A batch, the buffer it goes through, and how many of its pieces are still to be read."""

    __slots__ = ("batch", "buffer", "left")

    def __init__(self, batch: Batch, buffer: Buffer, left: int):
        self.batch, self.buffer, self.left = batch, buffer, left


class Pieces:
    """Batches of at most `most` bytes, each in jobs of at most `piece`; whoever ends a batch has it
    copied."""

    def __init__(self, ring: Ring, copier: Copier, most: int, piece: int):
        self._ring, self._copier, self._most, self._piece = ring, copier, most, piece
        self._lock = threading.Lock()

    def jobs(self, spans: Sequence[Span]) -> Iterator[Job]:
        """The next one waits until there is a buffer for it; none comes once the ring is closed."""
        for batch in batches(spans, self._most):
            if (buffer := self._ring.take()) is None:
                return
            starts = range(0, batch.nbytes, self._piece)
            filling = _Filling(batch, buffer, len(starts))
            counts = [(batch.bytes_read, batch.bytes_kept), *[(0, 0)] * (len(starts) - 1)]
            for start, (nbytes, kept) in zip(starts, counts, strict=True):
                yield Job(nbytes, kept, partial(self._load, filling, start))

    def _load(self, filling: _Filling, start: int, fill: Fill) -> None:
        batch, buffer, stop = filling.batch, filling.buffer, start + self._piece
        for at, read in batch.laid:
            begin, end = max(at, start), min(at + read.nbytes, stop)
            if begin < end:
                fill(read, begin - at, [buffer.view[begin:end]])
        with self._lock:
            filling.left -= 1
            last = not filling.left
        if last:
            self._ring.give(buffer, self._copier.copy(batch, buffer.data[: batch.nbytes]))


class Device:
    """Copies on a stream of its own: what is kept as it is goes to its place, all else to a staging
    buffer on the device, and from there, spread or cast, to its place. The stream's order keeps the
    buffer's users apart."""

    def __init__(self, arena: Arena, most: int):
        self._arena, self._lock = arena, threading.Lock()
        self._staging = torch.empty(most, dtype=torch.uint8, device=arena.device)
        self._stream = torch.cuda.Stream(arena.device)  # type: ignore[no-untyped-call]
        # The allocator may have given memory that the current stream still works on.
        self._stream.wait_stream(torch.cuda.current_stream(arena.device))
        self._marks = list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    @torch.inference_mode()  # the arena may have been made in it, by another thread
    def copy(self, batch: Batch, data: torch.Tensor) -> Fence:
        begin, end = _event(), _event()
        with self._lock, torch.cuda.stream(self._stream):
            begin.record()
            self._copy(batch, data)
            end.record()
            self._marks.append((begin, end))
        return end

    def _copy(self, batch: Batch, data: torch.Tensor) -> None:
        runs = runs_of(batch, self._arena)
        if runs is None:
            staged = self._staging[: batch.nbytes]
            staged.copy_(data, non_blocking=True)
            scatter(copies_of(batch.laid), staged, self._arena)
            return
        for at, to, nbytes in runs:
            self._arena.data[to : to + nbytes].copy_(data[at : at + nbytes], non_blocking=True)

    def finish(self) -> float:
        """Waits for all copies; -> seconds of the device's copying."""
        self._stream.synchronize()
        milliseconds: float = sum(begin.elapsed_time(end) for begin, end in self._marks)
        return milliseconds / 1000


def runs_of(batch: Batch, arena: Arena) -> list[tuple[int, int, int]] | None:
    """(byte of the buffer, byte of the arena, bytes) of the batch's pieces, those that touch in
    both as one; None where some are spread or cast, or hold bytes to drop."""
    found = list[tuple[int, int, int]]()
    for at, read in batch.laid:
        places = arena.places(read)
        if places is None:
            return None
        for to, nbytes in places:
            before, onto, most = found[-1] if found else (0, 0, -1)
            if (before + most, onto + most) == (at, to):
                found[-1] = before, onto, most + nbytes
            else:
                found.append((at, to, nbytes))
            at += nbytes
    return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
