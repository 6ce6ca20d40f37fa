"""What one rank has read so far, how long it took, and the memory it took beside its weights."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Progress = Callable[[int], None]  # bytes read so far
PERIOD = 0.02  # seconds between two looks at the memory
PAGE = resource.getpagesize()


def anonymous_bytes() -> int:
    """This process's resident memory that no file stands behind."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGE


@dataclass(slots=True)
class ReadStats:
    """bytes_read: of files. bytes_kept: of these, in the checkpoint's form. read_seconds: in which
    at least one read was under way. copy_seconds: in which bytes were moved, cast or on their way
    to a device. host_peak: the most anonymous memory since this was made, bytes, page-locked or
    not. progress: told after every read."""

    progress: Progress | None = None
    bytes_read: int = 0
    bytes_kept: int = 0
    read_seconds: float = 0.0
    copy_seconds: float = 0.0
    host_peak: int = 0
    _before: int = field(default_factory=anonymous_bytes)
    _looked: float = field(default_factory=time.monotonic)

    def add(self, nbytes: int, kept: int) -> None:
        self.bytes_read += nbytes
        self.bytes_kept += kept
        if self.progress is not None:
            self.progress(self.bytes_read)
        if time.monotonic() - self._looked > PERIOD:
            self.look_at_memory()

    def look_at_memory(self) -> None:
        self._looked = time.monotonic()
        self.host_peak = max(self.host_peak, anonymous_bytes() - self._before)
