"""Writes a checkpoint as one file a rank, cut by a plan, with tpx.json beside them.

Streams: a few MiB a thread are in memory, whatever the checkpoint's size. All ranks' files grow
together, so that what several ranks need of a tensor is read from the disk once.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from .files import open_file, unreadable
from .new_folder import check_target, new_folder
from .plan.manifest import MANIFEST, Stored, read_manifest
from .plan.prepare import Prepared
from .plan.rank_files import BESIDE, OURS, RankFile, backwards, manifest_of, rank_files, reads
from .plan.spans import GAP, Copy, Span, cut
from .read.copies import move
from .read.files import Files, fill
from .version import __version__

WINDOW = 4 << 20  # bytes of a rank's file that a thread makes at a time, and reads at most
THREADS = 8
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Written(NamedTuple):
    """bytes: of the ranks' files."""

    files: int
    nbytes: int
    seconds: float


def shard(
    prepared: Prepared, out: Path, force: bool = False, progress: Progress | None = None
) -> Written:
    """Writes `out`. force: in place of what `tpx shard` wrote there before.

    Raises PlanError where `out` is there, CheckpointError where a file cannot be read or written;
    then nothing is left.
    """
    begin = time.perf_counter()
    files = rank_files(prepared)
    total = sum(file.nbytes for file in files)
    check_target(out, total, force, OURS)
    with new_folder(out, force) as folder:
        for pattern in BESIDE:
            for path in filter(Path.is_file, prepared.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
        stored = write_files(prepared, files, folder, Counter(total, progress))
        (folder / MANIFEST).write_text(manifest_of(prepared, stored, __version__).to_json())
    return Written(len(files), total, time.perf_counter() - begin)


class Counter:
    """Bytes done, by all threads. stopped: set where one of them failed."""

    def __init__(self, total: int, progress: Progress | None):
        self.stopped = threading.Event()
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def write_files(
    prepared: Prepared, files: Sequence[RankFile], folder: Path, counter: Counter
) -> dict[str, Stored]:
    """Each file's size and hashes, in the files' order."""
    threads = min(THREADS, len(files))
    with (
        Files(prepared.folder, prepared.index.files) as source,
        ThreadPoolExecutor(threads, thread_name_prefix="tpx-shard") as pool,
    ):
        jobs: list[Future[dict[str, Stored]]] = [
            pool.submit(Writer(source, folder, counter).write, files[i::threads])
            for i in range(threads)
        ]
        try:
            found = {name: one for job in as_completed(jobs) for name, one in job.result().items()}
        finally:
            counter.stopped.set()
        source.check()
    return {file.name: found[file.name] for file in files}


class Writer:
    """What one thread does: some ranks' files, parameter by parameter."""

    def __init__(self, source: Files, folder: Path, counter: Counter):
        self._source, self._folder, self._counter = source, folder, counter
        self._window = torch.empty(WINDOW, dtype=torch.uint8)
        self._scratch = torch.empty(WINDOW, dtype=torch.uint8)
        self._hashes: dict[str, hashlib._Hash] = {}

    def write(self, files: Sequence[RankFile]) -> dict[str, Stored]:
        self._hashes = {file.name: hashlib.sha256() for file in files}
        for file in files:
            self._append(file, memoryview(file.head))
        for name in files[0].shards:
            for file in files:
                for window in cut(backwards(file.shards[name]), WINDOW):
                    if self._counter.stopped.is_set():
                        return {}
                    self._make(name, window)
                    self._append(file, self._window[: window.nbytes].numpy().data)
        return {
            file.name: Stored(file.nbytes, self._hashes[file.name].hexdigest(), file.header_digest)
            for file in files
        }

    def _append(self, file: RankFile, data: memoryview) -> None:
        with (self._folder / file.name).open("ab") as out:
            out.write(data)
        self._hashes[file.name].update(data)
        self._counter.add(len(data))

    def _make(self, name: str, window: Span) -> None:
        """Fills the window from the checkpoint's files."""
        assert sum(copy.kept for copy in window.copies) == window.nbytes, f"{name=}"
        for copy in window.copies:
            for row, count in reads(copy, GAP, WINDOW):
                self._read(name, copy, row, count)

    def _read(self, name: str, copy: Copy, row: int, count: int) -> None:
        file, to, at, nbytes, _, jump, step = copy
        at, to = at + row * step, to + row * jump
        stretch = (count - 1) * step + nbytes
        kept = Copy(name, 0, to, nbytes, count, step if count > 1 else 0, jump if count > 1 else 0)
        span = Span(file, at, stretch, (kept,))
        if count == 1:
            fill(self._source, span, [self._window[to : to + nbytes].numpy().data])
            return
        scratch = self._scratch[:stretch]
        fill(self._source, span, [scratch.numpy().data])
        move(kept, scratch, self._window)


def damaged(folder: Path) -> list[str]:
    """The ranks' files in a sharded checkpoint that do not have the bytes that were written.

    Raises CheckpointError where there is no manifest, or a file is missing.
    """
    manifest, _ = read_manifest(folder)
    with ThreadPoolExecutor(min(THREADS, len(manifest.files))) as pool:
        hashes = pool.map(lambda name: hash_of(folder / name), manifest.files)
        found = zip(manifest.files.items(), hashes, strict=True)
        return [name for (name, stored), sha256 in found if sha256 != stored.sha256]


def hash_of(path: Path) -> str:
    """Raises CheckpointError where it cannot be read."""
    with open_file(path, path.name) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path.name, error) from error
