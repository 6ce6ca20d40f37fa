"""Brings headers and blocks from the Hub, over several connections at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

from ..index import header_nbytes, parse_header
from .source import Found, Source
from .sparse import BLOCK, Hashes, SparseFile, runs

CONNECTIONS = 12  # at once, of all files together
REQUEST = 8  # blocks of one request: a connection that is cut costs no more than it has not brought
GUESS = 1 << 16  # bytes of the first request for a header, which is seldom longer

Report = Callable[[int, int], None]  # bytes done, bytes in all


class Job(NamedTuple):
    """Blocks of one file, in one request."""

    source: Source
    file: SparseFile
    blocks: range

    @property
    def nbytes(self) -> int:
        size = self.file.found.size
        return min(self.blocks.stop * BLOCK, size) - self.blocks.start * BLOCK


def jobs_of(source: Source, file: SparseFile, needed: Iterable[int]) -> list[Job]:
    """What is to be asked for, so that the file holds these blocks."""
    missing = sorted(set(needed) - file.blocks.keys())
    return [Job(source, file, blocks) for blocks in runs(missing, REQUEST)]


def fetch_header(source: Source, file: SparseFile, ending: threading.Event) -> None:
    """The header, and no other byte, stays; only one that CheckpointIndex takes."""
    if file.header is not None:
        return
    name, size = source.name, file.found.size
    data = b"".join(source.read(0, min(GUESS, size), ending))
    length = header_nbytes(data, name, size)
    data += b"".join(source.read(len(data), length, ending))
    parse_header(data[:length], name, size)
    file.add_header(data[:length])


def fetch_blocks(jobs: Iterable[Job], report: Report | None) -> None:
    """Raises the first error that a job meets; what the others have brought stays."""
    jobs = list(jobs)
    counter = _Counter(sum(job.nbytes for job in jobs), report)
    in_parallel([partial(_fetch, job, counter) for job in jobs])


def in_parallel(calls: Iterable[Callable[[threading.Event], None]]) -> None:
    """Each call is told to end by the event, where another one has failed."""
    ending = threading.Event()
    with ThreadPoolExecutor(CONNECTIONS, "tpx-hub") as pool:
        try:
            waiting = [pool.submit(call, ending) for call in calls]
            for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:  # also where the user interrupts
            ending.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch(job: Job, counter: _Counter, ending: threading.Event) -> None:
    at = job.blocks.start * BLOCK
    hashes = Hashes(job.blocks.start, job.file.found.size)
    for piece in job.source.read(at, at + job.nbytes, ending):
        job.file.write(piece, at)
        hashes.feed(piece)
        at += len(piece)
        counter.add(len(piece))
    job.file.add_blocks(job.blocks.start, hashes.digests)


class _Counter:
    def __init__(self, total: int, report: Report | None):
        self._done, self._total, self._report = 0, total, report
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._report is not None:
                self._report(self._done, self._total)


def describe(sources: Mapping[str, Source]) -> dict[str, Found]:
    """What the Hub says of each file, by name."""
    found: dict[str, Found] = {}

    def ask(name: str, source: Source, ending: threading.Event) -> None:
        found[name] = source.ask()

    in_parallel([partial(ask, name, source) for name, source in sources.items()])
    return {name: found[name] for name in sources}
