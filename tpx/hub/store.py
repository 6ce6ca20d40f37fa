"""A checkpoint of which only a part was fetched: its folder, and the lock that its users share.

It lies beside the Hub's own cache, where no other program takes it for whole files:

    HF_HUB_CACHE/tpx--models--OWNER--NAME/
        lock               shared while shards are read, exclusive while bytes are fetched
        refs/REVISION      the commit that a revision was when it was fetched first
        COMMIT/            config.json, tokenizer.json ..., and the shards, with holes
            .tpx/hub.json      of which repository, and every shard's size and ETag
            .tpx/SHARD.blocks  which blocks of the shard are there, and their hashes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ..errors import CheckpointError
from .client import is_offline
from .source import Found, Source
from .sparse import SparseFile, read_manifest, trusted
from .transfer import Report, fetch_blocks, jobs_of

RECORD = ".tpx/hub.json"
ROUNDS = 3  # another process may change the shards between two locks

Needed = Mapping[str, frozenset[int]]  # numbers of blocks, by shard


class Repository(NamedTuple):
    """A commit of a repository, and its shards."""

    hub_id: str
    commit: str
    shards: dict[str, Found]

    @property
    def nbytes(self) -> int:
        return sum(found.size for found in self.shards.values())


def home_of(hub_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"tpx--models--{hub_id.replace('/', '--')}"


def is_partial(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def read_repository(folder: Path) -> Repository:
    """Raises CheckpointError where the record is damaged."""
    try:
        hub_id, commit, shards = json.loads((folder / RECORD).read_text())
        return Repository(hub_id, commit, {name: Found(*shards[name]) for name in shards})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"`{folder / RECORD}` cannot be read", f"remove the folder `{folder}`"
        ) from error


def write_repository(folder: Path, repository: Repository) -> None:
    write_text(folder / RECORD, json.dumps(repository))


def write_text(path: Path, text: str) -> None:
    """The whole text, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def ref_of(hub_id: str, revision: str | None) -> Path:
    return home_of(hub_id) / "refs" / quote(revision or "main", safe="")


@contextmanager
def locked(home: Path, exclusive: bool) -> Iterator[None]:
    """Waits for its turn. A cache that cannot be written can be read."""
    import fcntl  # not on Windows, where folders can be planned for

    with disk_errors(home):
        file = _open_lock(home, exclusive)
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(file)


def _open_lock(home: Path, exclusive: bool) -> int:
    try:
        home.mkdir(parents=True, exist_ok=True)
        return os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        if exclusive:
            raise
        return os.open(home / "lock", os.O_RDONLY | os.O_CLOEXEC)


def manifest_of(folder: Path, shard: str) -> Path:
    return folder / ".tpx" / f"{shard}.blocks"


def open_shard(folder: Path, shard: str, found: Found) -> SparseFile:
    return SparseFile(folder / shard, manifest_of(folder, shard), found)


def missing(folder: Path, needed: Needed, sealed: bool = True) -> dict[str, frozenset[int]]:
    """Blocks that are not there. sealed: of a shard that has changed since it was written, all;
    else those that its manifest does not list."""
    shards, found = read_repository(folder).shards, {}
    for shard, blocks in needed.items():
        listed = read_manifest(manifest_of(folder, shard))
        if sealed:
            listed = trusted(folder / shard, listed, shards[shard])
        lacking = blocks if listed is None else blocks - listed.blocks.keys()
        if lacking:
            found[shard] = lacking
    return found


@contextmanager
def holding(folder: Path, needed: Needed, report: Report | None = None) -> Iterator[None]:
    """Fetches what is missing; while the context lasts, the blocks are there and stay.

    One process fetches, the others wait for it. Raises CheckpointError.
    """
    home = folder.parent
    for _ in range(ROUNDS):
        with locked(home, exclusive=False):
            if not missing(folder, needed):
                yield
                return
        with locked(home, exclusive=True), disk_errors(folder):
            _fetch(folder, needed, report)
    raise CheckpointError(
        f"`{folder}` is changed by another program", f"remove the folder `{folder}`"
    )


def _fetch(folder: Path, needed: Needed, report: Report | None) -> None:
    repository = read_repository(folder)
    with ExitStack() as stack:
        jobs = []
        for shard, blocks in needed.items():
            found = repository.shards[shard]
            file = stack.enter_context(open_shard(folder, shard, found))
            source = Source(repository.hub_id, repository.commit, shard, found)
            jobs += jobs_of(source, file, blocks)
        total = sum(job.nbytes for job in jobs)
        if total:
            _check(repository.hub_id, folder, total)
        fetch_blocks(jobs, report)


def _check(hub_id: str, folder: Path, total: int) -> None:
    if is_offline():
        raise CheckpointError(
            f"{total:,} bytes that the plan needs of `{hub_id}` are not in the Hub's cache, and "
            "HF_HUB_OFFLINE forbids to fetch them",
            "unset HF_HUB_OFFLINE, or use the plan that they were fetched for",
        )
    free = shutil.disk_usage(folder).free
    if free < total:
        raise CheckpointError(
            f"{total:,} bytes of `{hub_id}` are to be fetched, and `{folder}` has room for "
            f"{free:,}",
            "make room, or set HF_HUB_CACHE to a folder on another disk",
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """An OSError of the cache's own files, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the cache `{folder}` cannot be written: {error.strerror}",
            "make room or get the right to write, or set HF_HUB_CACHE to another folder",
        ) from error
