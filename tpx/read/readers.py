"""Threads that read: each takes the next job, until all are done or one has failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from ..plan.spans import Span
from .batches import Laid
from .files import Source, fill
from .ring import Buffer
from .stats import ReadStats

PERIOD = 0.02  # seconds between two words to the progress
NAME = "tpx-read"  # of a thread
Filled = tuple[Sequence[Laid], Buffer]  # reads, and the buffer that they are in
Waiting = SimpleQueue[Filled | None]


class Job(NamedTuple):
    """nbytes: that it reads. kept: of these, or of all that it completes. load: reads, and puts
    what was read where it is held, or on its way there."""

    nbytes: int
    kept: int
    load: Callable[[Readers], None]


class Readers:
    """jobs: asked for the next one by one thread at a time. let_go: lets threads go that wait for
    something that will not come, once one has failed. waiting: what is left to the caller."""

    def __init__(
        self, jobs: Iterator[Job], source: Source, stats: ReadStats, let_go: Callable[[], None]
    ):
        self._jobs, self._source, self._stats = enumerate(jobs), source, stats
        self._taking, self._counting = threading.Lock(), threading.Lock()
        self._stop, self._let_go = False, let_go
        self._nbytes = self._kept = 0  # not yet told
        self._filling, self._since = 0, 0.0  # threads that read, and since when
        self._errors = list[tuple[int, BaseException]]()

    def run(self, threads: int, waiting: Waiting) -> Generator[Filled, None, None]:
        """What jobs put into `waiting`, until all are done. Of several errors the first in the
        order of the jobs is raised, when no thread runs any more."""
        workers = [
            threading.Thread(target=self._work, args=(waiting,), name=NAME) for _ in range(threads)
        ]
        for worker in workers:
            worker.start()
        try:
            yield from self._until_ended(threads, waiting)
        finally:
            self._give_up()
            for worker in workers:
                worker.join()
            self._stats.look_at_memory()
        if self._errors:
            raise min(self._errors, key=lambda error: error[0])[1]
        self._tell()

    def _until_ended(self, threads: int, waiting: Waiting) -> Iterator[Filled]:
        told = time.monotonic()
        while threads:
            with suppress(Empty):
                item = waiting.get(timeout=PERIOD)
                if item is None:
                    threads -= 1
                else:
                    yield item
            if time.monotonic() - told > PERIOD:
                self._tell()
                told = time.monotonic()

    def _tell(self) -> None:
        with self._counting:
            nbytes, kept, self._nbytes, self._kept = self._nbytes, self._kept, 0, 0
        self._stats.add(nbytes, kept)

    def _give_up(self) -> None:
        self._stop = True
        self._let_go()

    def _work(self, waiting: Waiting) -> None:
        number = -1
        try:
            while (taken := self._next()) is not None:
                number, job = taken
                job.load(self)
                with self._counting:
                    self._nbytes += job.nbytes
                    self._kept += job.kept
        except BaseException as error:
            self._errors.append((number, error))
            self._give_up()
        finally:
            waiting.put(None)

    def _next(self) -> tuple[int, Job] | None:
        with self._taking:
            return None if self._stop else next(self._jobs, None)

    def fill(self, read: Span, begin: int, views: Sequence[memoryview]) -> None:
        """The read's bytes from `begin` on, into memory. Raises CheckpointError."""
        with self.reading():
            fill(self._source, read, views, begin)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a thread reads."""
        with self._counting:
            if not self._filling:
                self._since = time.perf_counter()
            self._filling += 1
        try:
            yield
        finally:
            with self._counting:
                self._filling -= 1
                if not self._filling:
                    self._stats.read_seconds += time.perf_counter() - self._since
