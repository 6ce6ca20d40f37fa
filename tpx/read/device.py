"""Onto a GPU, from page-locked buffers, in the order of one stream.

Small buffers: they are copied while they lie in the processor's caches. And few steps of Python for
each: one thread takes them at a time, whoever of the others waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .arena import Arena
from .batches import Laid, copies_of
from .copies import scatter
from .native import Part, sender
from .ring import Buffer


class Device:
    """Copies on a stream of its own. If it `sends`, bytes of files go to their places by `send`,
    which any thread calls. `copy` takes what was read: what is kept as it is goes to its place, all
    else to a staging buffer on the device, and from there, spread or cast, to its place. The
    stream's order keeps the buffers' users apart.

    most: bytes of a buffer. seconds: from the first copy's begin to the last one's end.
    """

    def __init__(self, arena: Arena, most: int):
        self._arena, self._most = arena, most
        self._staging: torch.Tensor | None = None  # made by the first batch that needs it
        self._stream = torch.cuda.Stream(arena.device)  # type: ignore[no-untyped-call]
        # The allocator may have given memory that the current stream still works on.
        self._stream.wait_stream(torch.cuda.current_stream(arena.device))
        self._sender = sender(self._stream)
        self._halves = dict[int, list[torch.cuda.Event]]()  # of each buffer that was sent from
        self._began, self.seconds = 0.0, 0.0

    @property
    def sends(self) -> bool:
        return self._sender is not None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """In which `copy` is called, by one thread; ends when all is copied."""
        # In inference mode because the arena may have been made in it.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()
                if self._began:
                    self.seconds = time.perf_counter() - self._began

    def copy(self, laid: Sequence[Laid], buffer: Buffer) -> None:
        """Begins to put what was read where it is held."""
        self._began = self._began or time.perf_counter()
        arena, runs = self._arena, runs_of(laid, self._arena)
        if runs is None:
            if self._staging is None:
                self._staging = torch.empty(self._most, dtype=torch.uint8, device=arena.device)
            end = laid[-1].at + laid[-1].read.nbytes
            self._staging[:end].copy_(buffer.data[:end], non_blocking=True)
            scatter(copies_of(laid), self._staging, arena)
            return
        for at, to, nbytes in runs:
            piece = buffer.data[at : at + nbytes]
            arena.data[to : to + nbytes].copy_(piece, non_blocking=True)

    def send(self, parts: Sequence[Part], buffer: Buffer) -> int:
        """See Sender.send."""
        assert self._sender is not None
        self._began = self._began or time.perf_counter()
        halves = self._halves.get(id(buffer))
        if halves is None:
            halves = self._halves[id(buffer)] = [_recorded(self._stream) for _ in range(2)]
        events = [event.cuda_event for event in halves]
        return self._sender.send(parts, buffer.data.data_ptr(), self._most // 2, events)

    def mark(self, buffer: Buffer) -> torch.cuda.Event:
        """When all that was begun with the buffer is done. One event for all uses of a buffer."""
        if not isinstance(buffer.used, torch.cuda.Event):
            return _recorded(self._stream)
        buffer.used.record(self._stream)
        return buffer.used


def runs_of(laid: Sequence[Laid], arena: Arena) -> list[tuple[int, int, int]] | None:
    """(byte of the buffer, byte of the arena, bytes) of the reads' pieces, those that touch in
    both as one; None where some are spread or cast, or hold bytes to drop."""
    found = list[tuple[int, int, int]]()
    for at, read in laid:
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


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
