"""A folder that is there whole or not at all: made beside its place, and renamed into it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from .errors import CheckpointError, PlanError

PARTIAL = ".partial-"


def check_target(out: Path, nbytes: int, replace: bool, ours: Sequence[str]) -> None:
    """Raises PlanError where `out` is there and may not be replaced: only a folder of nothing but
    files whose names match `ours` may. CheckpointError where the disk has no room for nbytes."""
    if os.path.lexists(out):
        if not replace:
            raise PlanError(
                f"`{out}` exists already", "give another folder, or replace it: `--force`"
            )
        foreign = out.name if out.is_symlink() or not out.is_dir() else _foreign(out, ours)
        if foreign is not None:
            raise PlanError(
                f"`{out}` was not written by `tpx shard` alone: it has `{foreign}`",
                "give another folder, or remove this one yourself",
            )
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"`{out}` needs {nbytes:,} bytes, and `{parent}` has {free:,} free",
            "make room, or give a folder on another disk",
        )


def _foreign(out: Path, ours: Sequence[str]) -> str | None:
    for entry in sorted(os.scandir(out), key=lambda entry: entry.name):
        known = any(fnmatch(entry.name, pattern) for pattern in ours)
        if not known or not entry.is_file(follow_symlinks=False):
            return entry.name
    return None


def leftovers(out: Path) -> list[Path]:
    """Folders of earlier runs that were killed while they made `out`."""
    return sorted(out.absolute().parent.glob(f"{out.name}{PARTIAL}*"))


@contextmanager
def new_folder(out: Path, replace: bool) -> Iterator[Path]:
    """An empty folder, which becomes `out` where the context ends well, and else is removed.

    An OSError inside becomes a CheckpointError: writing is all that may fail so.
    """
    out = out.absolute()
    partial = out.with_name(f"{out.name}{PARTIAL}{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _put(partial, out, replace)
    except OSError as error:
        raise CheckpointError(
            f"`{out}` cannot be written: {error.strerror}", "check its permissions, and its disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, out: Path, replace: bool) -> None:
    """Everything is on the disk before the name is, and the old folder goes last."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    old = partial.with_name(f"{partial.name}-old")
    if replace and out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """What is written of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
