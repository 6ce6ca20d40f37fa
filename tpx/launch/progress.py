"""How far each rank is: written by the ranks into a file each, drawn once for the whole job.

On a terminal a bar that goes away when the work is done, else one line at its end. The launcher
draws, or under plain torchrun rank 0. Knows no model and no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

RECORD = 128  # bytes: a record is written by one call, in one block
PERIOD = 0.05  # seconds between two looks at the records
DRAWING = "drawing"  # a file that is there until the first work is drawn to its end
DRAWER = "drawer"  # a file with the pid of the launcher that draws


class State(NamedTuple):
    """One rank's latest record; done and total in bytes, seconds since its work began."""

    rank: int
    phase: str
    done: int
    total: int
    seconds: float


class Writer:
    """One rank's records. path: <folder>/<rank>, in a folder that all ranks of a machine share."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.close = weakref.finalize(self, os.close, self._file)  # also where loading fails
        self._begin = time.monotonic()

    def update(self, phase: str, done: int, total: int) -> None:
        """done, total: bytes."""
        record = State(0, phase, done, total, time.monotonic() - self._begin)
        text = json.dumps(record[1:]).encode()
        os.pwrite(self._file, text.ljust(RECORD), 0)


def read_all(folder: Path) -> list[State]:
    """The latest record of each rank, by rank."""
    if not folder.is_dir():
        return []
    read = (read_record(path) for path in folder.iterdir() if path.name.isdecimal())
    return sorted(state for state in read if state is not None)


def read_record(path: Path) -> State | None:
    """None where nothing was written yet."""
    try:
        return State(int(path.name), *json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def is_done(states: Sequence[State], ranks: int) -> bool:
    return len(states) >= ranks and all(state.done >= state.total for state in states)


def wait_until_erased(folder: Path, limit: float = 1.0) -> None:
    """Until the work is drawn to its end: for a rank that is about to print, once all are done."""
    deadline = time.monotonic() + limit
    while (folder / DRAWING).exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def expect(folder: Path) -> None:
    """Says that the next work in this folder will be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DRAWING).touch()


def announce(folder: Path) -> None:
    """Says that this process draws; the ranks that it starts then leave it to it."""
    expect(folder)
    (folder / DRAWER).write_text(str(os.getpid()))


def launcher_draws(folder: Path) -> bool:
    """Whether the parent of this process has announced itself."""
    path = folder / DRAWER
    return path.is_file() and path.read_text() == str(os.getppid())


def draw(folder: Path, ranks: int, end: threading.Event, console: Console | None = None) -> None:
    """Draws what `ranks` ranks write into the folder, each time that work begins, until `end`."""
    last: list[State] = []
    while not end.is_set():
        last = draw_next(folder, ranks, end, console, last)


def draw_once(folder: Path, ranks: int) -> None:
    """Draws one piece of work, and removes its records."""
    draw_next(folder, ranks, threading.Event())
    shutil.rmtree(folder, ignore_errors=True)


def draw_next(
    folder: Path,
    ranks: int,
    end: threading.Event,
    console: Console | None = None,
    last: Sequence[State] = (),
) -> list[State]:
    """Waits for records other than the `last` ones, draws until all ranks are done; -> theirs."""
    console = console or Console(stderr=True)
    states = read_all(folder)
    while (not states or states == last) and not end.wait(PERIOD):
        states = read_all(folder)
    if not is_done(states, ranks) and console.is_terminal:
        draw_bar(folder, ranks, end, console)
    while not is_done(states := read_all(folder), ranks) and not end.wait(PERIOD):
        pass
    if is_done(states, ranks) and states != last and not console.is_terminal:
        console.print(summary(states), highlight=False)
    (folder / DRAWING).unlink(missing_ok=True)
    return states


def draw_bar(folder: Path, ranks: int, end: threading.Event, console: Console) -> None:
    """One bar for all ranks, until they are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        while not is_done(states := read_all(folder), ranks) and not end.wait(PERIOD):
            done, total = sum_up(states, ranks)
            phase = states[0].phase if states else ""
            bar.update(task, description=phase, completed=done, total=total)


def sum_up(states: Sequence[State], ranks: int) -> tuple[int, int]:
    """Bytes done and in all; ranks that have written nothing yet count like the others' mean."""
    done, total = sum(s.done for s in states), sum(s.total for s in states)
    return done, total * ranks // max(1, len(states))


def summary(states: Sequence[State]) -> str:
    """`load: 29.2 MB on 2 ranks in 0.8 s`; of the slowest rank."""
    total = sum(state.total for state in states)
    ranks = "1 rank" if len(states) == 1 else f"{len(states)} ranks"
    seconds = max(state.seconds for state in states)
    return f"{states[0].phase}: {total / 1e6:,.1f} MB on {ranks} in {seconds:.1f} s"
