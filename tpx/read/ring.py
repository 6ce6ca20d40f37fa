"""A fixed number of buffers that reader threads fill and one thread empties."""

from __future__ import annotations

import queue
import threading
from typing import Protocol

import torch

from .arena import empty


class Fence(Protocol):
    """Something on a device that must have happened."""

    def synchronize(self) -> None: ...


class Buffer:
    """data: uint8, on the CPU. view: the same bytes, to read into. used: who filled it last may
    still be read from it until then."""

    __slots__ = ("data", "used", "view")

    def __init__(self, data: torch.Tensor):
        self.data = data
        self.view: memoryview = data.numpy().data
        self.used: Fence | None = None


class Ring:
    """Up to `count` buffers of `nbytes`, each made when it is first needed, by the thread that
    needs it. pin: in page-locked memory, from where a GPU copies directly."""

    def __init__(self, count: int, nbytes: int, pin: bool = False):
        self.nbytes = count * nbytes
        self._each, self._pin, self._left = nbytes, pin, count
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()

    def take(self) -> Buffer | None:
        """The one that has been free the longest, once what was in it has been copied; waits until
        there is one. None once the ring is closed."""
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            if self._may_make():
                return self._made()
            buffer = self._free.get()
        if buffer is None:
            self.close()  # for the next one who waits
        elif buffer.used is not None:
            buffer.used.synchronize()
        return buffer

    def give(self, buffer: Buffer, used: Fence | None = None) -> None:
        """used: when what was read from it."""
        buffer.used = used
        self._free.put(buffer)

    def close(self) -> None:
        self._free.put(None)

    def _may_make(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _made(self) -> Buffer:
        if self._pin:
            return Buffer(torch.empty(self._each, dtype=torch.uint8, pin_memory=True))
        return Buffer(empty(self._each, torch.device("cpu")))
