"""A fixed number of buffers that reader threads fill and one thread empties."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from .arena import empty

PAGE = 4096  # bytes; pages are larger on some machines
PORTABLE = 1  # cudaHostRegister's: page-locked for every GPU of the process


class Fence(Protocol):
    """Something on a device that must have happened."""

    def query(self) -> bool: ...

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
    """Up to `count` buffers of `most` bytes, each made when it is first needed, by the thread that
    needs it. pin: page-locked, as long as the ring lives, for the current GPU to copy from."""

    def __init__(self, count: int, most: int, pin: bool = False):
        self.most = most
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        data = empty(count * most, torch.device("cpu"))
        self._unmade = (data[start : start + most] for start in range(0, len(data), most))
        self._gpu = torch.cuda.current_device() if pin else None
        self._locked = list[int]()  # addresses
        weakref.finalize(self, _unlock, self._locked).atexit = False  # the process ends

    def take(self) -> Buffer | None:
        """The one that has been free the longest, once what was in it has been copied; waits until
        there is one. None once the ring is closed."""
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            with self._lock:
                data = next(self._unmade, None)
            if data is not None:
                return self._made(data)
            buffer = self._free.get()
        if buffer is None:
            self.close()  # for the next one who waits
        elif buffer.used is not None and not buffer.used.query():
            buffer.used.synchronize()
        return buffer

    def give(self, buffer: Buffer, used: Fence | None = None) -> None:
        """used: when what was read from it."""
        buffer.used = used
        self._free.put(buffer)

    def close(self) -> None:
        self._free.put(None)

    def _made(self, data: torch.Tensor) -> Buffer:
        if self._gpu is not None:
            data[::PAGE] = 0  # by this thread: the driver clears one buffer's pages after another's
            with torch.cuda.device(self._gpu):
                _lock(data)
            self._locked.append(data.data_ptr())
        return Buffer(data)


def _lock(data: torch.Tensor) -> None:
    """Page-locks memory that there is: five times as fast as to have the driver allocate it."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, PORTABLE))


def _unlock(addresses: Sequence[int]) -> None:
    for address in addresses:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostUnregister(address))
