"""Runs a checked job to its end: draws its progress, and turns how it ended into an exit code."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .elastic import launch
from .preflight import Job
from .progress import announce, draw
from .report import Ending, count_oom_kills, ending, read_records


def supervise(job: Job, full_traceback: bool = False) -> Ending:
    """Raises LaunchError (7) where the ranks cannot meet."""
    kills = count_oom_kills()
    try:
        with drawing(job.run_dir / "progress", job.nproc):
            outcome = launch(job)
    finally:
        tidy(job.run_dir)
    if outcome.signal is not None:
        return Ending(128 + outcome.signal, f"{signal_words(outcome.signal)}: all ranks have ended")
    if not outcome.failures:
        return Ending(0)
    out_of_memory = count_oom_kills() > kills
    records = read_records(job.run_dir)
    return ending(outcome.failures, records, job.nproc, full_traceback, out_of_memory)


def signal_words(received: signal.Signals) -> str:
    return "interrupted" if received == signal.SIGINT else f"stopped by {received.name}"


def tidy(run_dir: Path) -> None:
    """Leaves what is worth reading: the plan, and records of errors."""
    for part in ("progress", "elastic"):
        shutil.rmtree(run_dir / part, ignore_errors=True)
    for folder in (run_dir / "errors", run_dir):
        if not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def drawing(folder: Path, ranks: int) -> Iterator[None]:
    """Draws what the ranks write into `folder` meanwhile."""
    announce(folder)
    end = threading.Event()
    thread = threading.Thread(target=draw, args=(folder, ranks, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
