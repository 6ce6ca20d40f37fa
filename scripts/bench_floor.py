"""Floors of loading: what threads can read, into any memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tpx.plan.spans import Span, cut


def parallel_reads(
    folder: Path,
    spans: Sequence[Span],
    place: Callable[[int, Span, int], memoryview],
    threads: int,
    most: int = 4 << 20,
) -> None:
    """Reads the spans in pieces of at most `most` bytes. place: where one goes, by the thread's
    number, the read, and the sum of the bytes before it."""
    files = {name: os.open(folder / name, os.O_RDONLY) for name in {span.file for span in spans}}
    for file in files.values():
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    reads, at = [], 0
    for span in spans:
        for read in cut(span, most):
            reads.append((read, at))
            at += read.nbytes
    todo, lock = iter(reads), threading.Lock()

    def work(thread: int) -> None:
        while True:
            with lock:
                job = next(todo, None)
            if job is None:
                return
            read, at = job
            view, done = place(thread, read, at)[: read.nbytes], 0
            while done < read.nbytes:
                got = os.preadv(files[read.file], [view[done:]], read.offset + done)
                assert got, read
                done += got

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for file in files.values():
        os.close(file)
