"""Runs a checked job to its end: keeps and shows what it prints, watches it, draws its progress,
and turns how it ended into one error and an exit code."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from ..errors import TpxError
from .elastic import Failure, Outcome, launch
from .logs import Logs, views
from .memory import count_oom_kills
from .options import Options
from .preflight import Job
from .progress import announce, draw
from .report import Ending, Memory, ending, read_records
from .run_files import RunFiles
from .watch import Limits, Watch

KEPT_OF_A_RUN = ("rank*.out", "rank*.err", "events.jsonl", "run.json", "hang", "beats")


Drawer = Callable[[Path, int, threading.Event, Console], None]


def supervise(job: Job, options: Options, drawer: Drawer = draw) -> Ending:
    """drawer: of what the ranks do, see progress.draw. Raises LaunchError (7) where the ranks
    cannot meet."""
    clear(job.run_dir)
    files = RunFiles(job)
    out, err = Console(), Console(stderr=True)
    logs = Logs(
        job.run_dir, job.nproc, views(job.nproc, options.prefix, job.command.generates, out, err)
    )
    limits = Limits(job.shutdown_timeout, options.hang_timeout)
    watch = Watch(job.run_dir, files, limits, lambda: logs.heard, lambda line: say(err, line))
    kills = count_oom_kills()
    try:
        with watch.watching(), drawing(job.run_dir / "progress", job.nproc, err, drawer):
            outcome = launch(job, logs.paths)
            watch.failed = bool(outcome.failures)
        memory = Memory(watch.held, count_oom_kills() > kills)
        found = end_of(job, outcome, watch, memory, options.traceback)
    except TpxError as error:
        files.end(error.exit_code, error.render())
        raise
    finally:
        logs.close()
        tidy(job.run_dir)
    if logs.full is not None:
        say(err, f"warning: what the ranks printed is not all in `{job.run_dir}`: {logs.full}")
    files.end(found.exit_code, found.text)
    return found


def end_of(job: Job, outcome: Outcome, watch: Watch, memory: Memory, full: bool) -> Ending:
    if outcome.signal is not None:
        return Ending(128 + outcome.signal, f"{signal_words(outcome.signal)}: all ranks have ended")
    if not outcome.failures:
        return Ending(0)
    if watch.hang is not None:
        return Ending(watch.hang.exit_code, watch.hang.render())
    ends = {rank: death.time_ns for rank, death in watch.deaths.items()}
    failures = [Failure(rank, code, ends.get(rank, 0)) for rank, code, _ in outcome.failures]
    return ending(failures, read_records(job.run_dir), job.nproc, full, memory)


def signal_words(received: signal.Signals) -> str:
    return "interrupted" if received == signal.SIGINT else f"stopped by {received.name}"


def say(console: Console, line: str) -> None:
    """Above the bar, where there is one."""
    with suppress(OSError):  # nobody reads it
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def clear(run_dir: Path) -> None:
    """Of an earlier run in the same folder."""
    for pattern in KEPT_OF_A_RUN:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def tidy(run_dir: Path) -> None:
    """Removes what only a running job needs."""
    for part in ("progress", "beats"):
        shutil.rmtree(run_dir / part, ignore_errors=True)
    errors = run_dir / "errors"
    if errors.is_dir() and not any(errors.iterdir()):
        errors.rmdir()


@contextmanager
def drawing(folder: Path, ranks: int, console: Console, drawer: Drawer) -> Iterator[None]:
    """Draws what the ranks write into `folder` meanwhile."""
    announce(folder)
    end = threading.Event()
    thread = threading.Thread(target=drawer, args=(folder, ranks, end, console), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
