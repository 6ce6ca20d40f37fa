"""send.cpp: many pieces of files to a device in one call, which needs no Python between them.

Optional: where it cannot be built, or CUDA's library is not found, Python reads each buffer.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch

from ..ops.cpu.build import BuildError, Code, cache_folder, open_library

LOG = logging.getLogger("tpx")
CODE = Code((Path(__file__).with_name("send.cpp"),), ("-O2", "-std=c++17", "-fPIC"))
LOST = "weights take up to twice as long to load"
CALLS = {"set_device": "SetDevice", "copy": "MemcpyAsync", "record": "EventRecord"}
CALLS["wait"] = "EventSynchronize"


class Cuda(ctypes.Structure):
    """CUDA's functions, as addresses, and where they copy to."""

    _fields_ = [*((name, c_void_p) for name in CALLS), ("stream", c_void_p), ("device", c_int)]


class Part(NamedTuple):
    """Bytes of an open file, and the address where they go."""

    file: int
    offset: int
    nbytes: int
    to: int


class Sender:
    def __init__(self, built: ctypes.CDLL, cuda: Cuda):
        self._send, self._cuda = built.tpx_send, cuda
        self._send.restype = c_int64
        self._send.argtypes = [
            POINTER(Cuda), c_void_p, c_int64, c_void_p, c_void_p, c_int64, POINTER(c_int),
        ]  # fmt: skip

    def send(self, parts: Sequence[Part], buffer: int, piece: int, events: Sequence[int]) -> int:
        """Reads the parts and begins to copy them, through the 2 * `piece` bytes at `buffer`, each
        half of which has one of the two events. -> bytes, fewer than the parts have where a read
        fails or a file ends. Raises CUDA's error."""
        error, flat = c_int(), [number for part in parts for number in part]
        sent: int = self._send(
            byref(self._cuda),
            (c_int64 * len(flat))(*flat),
            len(parts),
            buffer,
            (c_void_p * 2)(*events),
            piece,
            byref(error),
        )
        if error.value:
            torch.cuda.check_error(error.value)
        return sent


def sender(stream: torch.cuda.Stream) -> Sender | None:
    """Onto the stream's device, in its order; None where there is none."""
    if (built := library()) is None:
        return None
    runtime = cuda_runtime()
    calls = [ctypes.cast(getattr(runtime, f"cuda{name}"), c_void_p) for name in CALLS.values()]
    return Sender(built, Cuda(*calls, stream.cuda_stream, stream.device_index))


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where it cannot be built, or there is no CUDA for it; that is logged once."""
    try:
        cuda_runtime()
        return open_library(cache_folder(), CODE)
    except (BuildError, OSError) as error:
        LOG.warning(f"no C++ to load with, {LOST}: {error}")
        return None


def cuda_runtime() -> ctypes.CDLL:
    """The one that torch has loaded. Raises OSError."""
    version = (torch.version.cuda or "").partition(".")[0]
    return ctypes.CDLL(f"libcudart.so.{version}")
