"""The files of a checkpoint, and reading a stretch of one whole or saying what is wrong with it."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ..errors import CheckpointError
from ..files import open_file
from ..index import FileId
from ..plan.spans import Span

MOST_OPEN = 64  # files; a process may have 1024 of them, and a checkpoint more
MOST_BUFFERS = 1024  # of one preadv: the kernel's IOV_MAX
AGAIN = "start again when nothing writes to the checkpoint"


class Source(Protocol):
    """Where bytes come from, for several threads at once."""

    def preadv(self, file: str, buffers: Sequence[memoryview], offset: int) -> int:
        """As os.preadv: fills the buffers in order from the file's byte `offset`; -> bytes read,
        fewer than asked where it likes, 0 only at the file's end. Raises OSError."""
        ...


@dataclass(slots=True)
class _Open:
    file: io.FileIO
    users: int = 0


class Files:
    """A folder's files, each opened when it is first read; at most MOST_OPEN are open at a time.

    ids: of each file, as it was when its header was checked. One that is no longer the same when it
    is opened, when it is closed to make room, or at `check`, is a CheckpointError.
    """

    def __init__(self, folder: Path, ids: Mapping[str, FileId]):
        self._folder, self._ids = folder, ids
        self._open: dict[str, _Open] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        for entry in self._open.values():
            entry.file.close()
        self._open.clear()

    def preadv(self, file: str, buffers: Sequence[memoryview], offset: int) -> int:
        with self.opened(file) as number:
            return os.preadv(number, buffers, offset)

    @contextmanager
    def opened(self, file: str) -> Iterator[int]:
        """The open file's number, which stays its own until the end. Raises CheckpointError."""
        with self._lock:
            entry = self._open.get(file) or self._opened(file)
            entry.users += 1
        try:
            yield entry.file.fileno()
        finally:
            with self._lock:
                entry.users -= 1

    def check(self) -> None:
        """Raises CheckpointError where a file has changed since it was opened."""
        for name, entry in self._open.items():
            self._check(name, entry.file, "while it was loaded")

    def _opened(self, name: str) -> _Open:
        self._make_room()
        file = open_file(self._folder / name, name)
        try:
            self._check(name, file, "after its header was checked")
            # Reading ahead would take bytes from the disk that this rank does not keep.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            file.close()
            raise
        entry = self._open[name] = _Open(file)
        return entry

    def _make_room(self) -> None:
        idle = [name for name, entry in self._open.items() if not entry.users]
        if len(self._open) >= MOST_OPEN and idle:
            with self._open.pop(idle[0]).file as oldest:
                self._check(idle[0], oldest, "while it was loaded")

    def _check(self, name: str, file: io.FileIO, when: str) -> None:
        now, was = FileId.of(os.fstat(file.fileno())), self._ids[name]
        if now == was:
            return
        if now.inode != was.inode:
            how = "another file took its place"
        elif now.size != was.size:
            how = f"it has `{now.size}` bytes and had `{was.size}`"
        else:
            how = "it was written to"
        raise CheckpointError(f"`{name}` changed {when}: {how}", AGAIN)


def fill(source: Source, span: Span, buffers: Sequence[memoryview], begin: int = 0) -> None:
    """Reads as many bytes of the span as the buffers have, from its byte `begin` on. Raises
    CheckpointError, with the byte of the file."""
    left, done = [buffer for buffer in buffers if len(buffer)], begin
    assert begin + sum(map(len, left)) <= span.nbytes, f"{span.nbytes=} {begin=}"
    while left:
        try:
            got = source.preadv(span.file, left[:MOST_BUFFERS], span.offset + done)
        except OSError as error:
            raise CheckpointError(
                f"`{span.file}` cannot be read at byte `{span.offset + done}`, in "
                f"`{parameter_at(span, done)}`: {error.strerror}",
                "check the disk that holds it",
            ) from error
        if got == 0:
            raise CheckpointError(
                f"`{span.file}` ends at byte `{span.offset + done}`, inside "
                f"`{parameter_at(span, done)}`",
                "the file was cut short after its header was checked; fetch it again",
            )
        done += got
        left = _after(left, got)


def parameter_at(span: Span, byte: int) -> str:
    """The parameter that keeps the span's byte, else the next one that keeps any."""
    behind = (copy.parameter for copy in span.copies if copy.end > byte)
    return next(behind, span.copies[-1].parameter if span.copies else "")


def _after(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of the buffers when the first `nbytes` are filled."""
    for at, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[at + 1 :]]
        nbytes -= len(buffer)
    return []
