"""How far each rank is: written by the ranks into a file each, drawn once for the whole job.

On a terminal a bar, with what each rank does, that goes away when the work is done, else one line
at its end. The launcher draws, or under plain torchrun rank 0. Knows no model and no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

RECORD = 128  # bytes: a record is written by one call, in one block
PERIOD = 0.05  # seconds between two looks at the records
WINDOW = 2.0  # seconds that a rate is of
MOST_ROWS = 8  # of ranks; of more only the slowest, the mean and the fastest are shown
DRAWING = "drawing"  # a file that is there until the first work is drawn to its end
DRAWER = "drawer"  # a file with the pid of the launcher that draws


class State(NamedTuple):
    """One rank's latest record; done and total in bytes, as is kept, what it keeps of the total in
    the end; seconds since its work began."""

    rank: int
    phase: str
    done: int
    total: int
    kept: int
    seconds: float


class Writer:
    """One rank's records. path: <folder>/<rank>, in a folder that all ranks of a machine share."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.close = weakref.finalize(self, os.close, self._file)  # also where loading fails
        self._begin = time.monotonic()

    def update(self, phase: str, done: int, total: int, kept: int) -> None:
        """done, total, kept: bytes."""
        record = State(0, phase, done, total, kept, time.monotonic() - self._begin)
        text = json.dumps(record[1:]).encode()
        with suppress(OSError):  # a disk that is full is no reason to stop
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
    """One bar for all ranks, and what each does, until they are done."""
    from rich.live import Live

    rates = Rates()
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while not is_done(states := read_all(folder), ranks) and not end.wait(PERIOD):
            rates.hear(states, time.monotonic())
            live.update(picture(states, ranks, rates), refresh=True)


class Rates:
    """Bytes a second of each rank, over the last WINDOW seconds."""

    def __init__(self) -> None:
        self._heard: deque[tuple[float, dict[int, int]]] = deque()

    def hear(self, states: Sequence[State], now: float) -> None:
        self._heard.append((now, {state.rank: state.done for state in states}))
        while now - self._heard[0][0] > WINDOW:
            self._heard.popleft()

    def of(self, rank: int) -> float:
        heard = [(at, done[rank]) for at, done in self._heard if rank in done]
        if len(heard) < 2 or heard[-1][0] == heard[0][0]:
            return 0.0
        (begin, first), (end, last) = heard[0], heard[-1]
        return max(0, last - first) / (end - begin)


def picture(states: Sequence[State], ranks: int, rates: Rates) -> Table:
    """The job's bar; below it a row a rank, or of many ranks the slowest, the mean, the fastest."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    done, total = sum_up(states, ranks)
    speeds = {state.rank: rates.of(state.rank) for state in states}
    bar = ProgressBar(total=max(1, total), completed=done)
    phase = states[0].phase if states else ""
    table.add_row(phase, bar, *figures(done, total, sum(speeds.values())))
    if 1 < ranks <= MOST_ROWS:
        found = {state.rank: state for state in states}
        for rank in range(ranks):
            row = ("waits", "") if rank not in found else figures(*found[rank][2:4], speeds[rank])
            table.add_row(f" rank {rank}", "", *row)
    elif ranks > 1 and states:
        ordered = sorted(states, key=lambda state: state.done / max(1, state.total))
        for word, state in (("slowest", ordered[0]), ("fastest", ordered[-1])):
            row = figures(state.done, state.total, speeds[state.rank])
            table.add_row(f" {word}", f"rank {state.rank}", *row)
        mean = figures(done // ranks, total // ranks, sum(speeds.values()) / len(states))
        table.add_row(" mean", f"of {ranks} ranks", *mean)
    return table


def figures(done: int, total: int, rate: float) -> tuple[str, str]:
    """`8.20/13.76 GB` and `5.3 GB/s`, or `done`."""
    scale, unit = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    word = "done" if 0 < total <= done else speed(rate)
    return f"{done / scale:,.2f}/{total / scale:,.2f} {unit}", word


def speed(rate: float) -> str:
    """rate: bytes a second."""
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def sum_up(states: Sequence[State], ranks: int) -> tuple[int, int]:
    """Bytes done and in all; ranks that have written nothing yet count like the others' mean."""
    done, total = sum(s.done for s in states), sum(s.total for s in states)
    return done, total * ranks // max(1, len(states))


def summary(states: Sequence[State]) -> str:
    """`load: 13.76 GB on 8 ranks in 2.6 s, 5.3 GB/s, read 1.00x of what is kept`; the seconds are
    the slowest rank's."""
    total, kept = sum(state.total for state in states), sum(state.kept for state in states)
    nbytes = f"{total / 1e9:,.2f} GB" if total >= 1e9 else f"{total / 1e6:,.1f} MB"
    ranks = "1 rank" if len(states) == 1 else f"{len(states)} ranks"
    seconds = max(state.seconds for state in states)
    rate = speed(total / seconds) if seconds > 0 else speed(0)
    share = f", read {total / kept:.2f}x of what is kept" if kept else ""
    return f"{states[0].phase}: {nbytes} on {ranks} in {seconds:.1f} s, {rate}{share}"
