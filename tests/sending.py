"""Loading as on a GPU, without one: memory of this process stands for the device's."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from ctypes import CFUNCTYPE, c_int, c_size_t, c_void_p
from queue import SimpleQueue
from typing import Any

from tpx.ops.cpu.build import BuildError, cache_folder, open_library
from tpx.plan.spans import Span
from tpx.read import Arena, Buffer, Limits, ReadStats, Ring, Source, scatter
from tpx.read.batches import copies_of
from tpx.read.device import runs_of
from tpx.read.jobs import jobs
from tpx.read.native import CODE, Cuda, Part, Sender
from tpx.read.readers import Filled, Readers

Copied = tuple[int, int, int]  # to, from, bytes


@functools.cache
def built() -> ctypes.CDLL | None:
    try:
        return open_library(cache_folder(), CODE)
    except (BuildError, OSError):
        return None


class Stream:
    """As much of CUDA as send.cpp needs. Copies wait until an event behind them is waited for."""

    def __init__(self, fails: str = ""):
        self.todo, self.fails = deque[Copied | int](), fails
        one, five = [c_void_p], [c_void_p, c_void_p, c_size_t, c_int, c_void_p]
        types = {"set_device": [c_int], "copy": five, "record": [*one, c_void_p], "wait": one}
        self._calls = {
            name: CFUNCTYPE(c_int, *arguments)(getattr(self, name))
            for name, arguments in types.items()
        }
        self.cuda = Cuda(*(ctypes.cast(call, c_void_p) for call in self._calls.values()), 0, 3)

    def set_device(self, device: int) -> int:
        return 0 if device == 3 else 101

    def copy(self, to: int, source: int, nbytes: int, kind: int, stream: Any) -> int:
        assert kind == 1
        self.todo.append((to, source or 0, nbytes))
        return 2 if self.fails == "copy" else 0

    def record(self, event: int, stream: Any) -> int:
        self.todo.append(event)
        return 0

    def wait(self, event: int | None = None) -> int:
        """None: for all."""
        while event in self.todo or (event is None and self.todo):
            first = self.todo.popleft()
            if isinstance(first, tuple):
                ctypes.memmove(*first)
        return 0


class Target:
    """Stands for read/device.py's Device: a Target of read/jobs.py."""

    def __init__(self, ring: Ring, library: ctypes.CDLL | None, fails: str = ""):
        self.stream, self._ring = Stream(fails), ring
        self.sends = library is not None
        if library is not None:
            self._sender = Sender(library, self.stream.cuda)

    def send(self, parts: Sequence[Part], buffer: Buffer) -> int:
        address = buffer.data.data_ptr()
        return self._sender.send(parts, address, self._ring.most // 2, [address, address + 1])

    def mark(self, buffer: Buffer) -> Target:
        return self

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.stream.wait()


def load_as_on_gpu(
    spans: Sequence[Span],
    source: Source,
    arena: Arena,
    stats: ReadStats,
    limits: Limits,
    kind: type[Target] = Target,
    library: ctypes.CDLL | None = None,
) -> None:
    """As load_spans on a GPU; what is read into a buffer is copied at once. library: see `built`;
    without it nothing is sent."""
    ring, waiting = Ring(limits.buffers, limits.most), SimpleQueue[Filled | None]()
    target = kind(ring, library)
    todo = jobs(spans, source, arena, ring, target, waiting)
    with closing(Readers(todo, source, stats, ring.close).run(limits.threads, waiting)) as filled:
        for laid, buffer in filled:
            runs = runs_of(laid, arena)
            for at, to, nbytes in runs or ():
                arena.data[to : to + nbytes] = buffer.data[at : at + nbytes]
            if runs is None:
                scatter(copies_of(laid), buffer.data, arena)
            ring.give(buffer)
    target.synchronize()
