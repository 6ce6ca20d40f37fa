"""Opens and reads files that somebody else prepared: regular ones only, and never for ever."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from .errors import CheckpointError
from .strict_json import AGAIN, shown

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path, name: str) -> io.FileIO:
    """The regular file at `path`, unbuffered. Raises CheckpointError, which calls it `name`."""
    try:
        _check_regular(os.stat(path), name)  # first: to open a device may do something
        # Not to wait for a writer where a pipe took the file's place meanwhile.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise _missing(path, name) from error
    except OSError as error:
        raise unreadable(name, error) from error
    opened = io.FileIO(file)
    try:
        _check_regular(os.fstat(file), name)
    except CheckpointError:
        opened.close()
        raise
    return opened


def read(file: io.FileIO, most: int, name: str) -> bytes:
    """The next `most` bytes, or all up to the file's end. Raises CheckpointError."""
    parts, left = [], most
    try:
        while left and (part := file.read(min(left, 1 << 24))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise unreadable(name, error, file.tell()) from error
    return b"".join(parts)


def unreadable(name: str, error: OSError, byte: int | None = None) -> CheckpointError:
    where = "" if byte is None else f" at byte `{byte}`"
    return CheckpointError(
        f"`{name}` cannot be read{where}: {error.strerror}",
        "check its permissions, and the disk that holds it",
    )


def _missing(path: Path, name: str) -> CheckpointError:
    if path.is_symlink():
        target = shown(os.readlink(path))
        return CheckpointError(f"`{name}` is a link to `{target}`, which is missing", AGAIN)
    return CheckpointError(f"`{name}` is missing from folder `{path.parent}`", AGAIN)


def _check_regular(info: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        kind = KINDS.get(stat.S_IFMT(info.st_mode), "no file")
        raise CheckpointError(
            f"`{name}` is {kind}, not a file", "give the folder of a whole checkpoint"
        )
