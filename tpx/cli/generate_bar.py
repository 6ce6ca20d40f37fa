"""How far the requests of `tpx generate` are: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import json
import threading
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..launch.progress import PERIOD, State, draw_next, read_all
from ..results_file import PROGRESS

LINES = 10.0  # seconds between two lines
WINDOW = 10.0  # seconds that a rate is of
NOTHING = State(0, "", 0, 0, 0, 0.0)


class Bar:
    """total: requests; before: those that were done before. Of all attempts of the ranks."""

    def __init__(self, total: int, before: int):
        self.total, self.before = total, before
        self.done, self.tokens, self.seconds = before, 0, 0.0
        self._state = NOTHING
        self._heard: deque[tuple[float, int]] = deque([(0.0, 0)])

    def draw(self, folder: Path, ranks: int, end: threading.Event, console: Console) -> None:
        """Draws each load, and after it the requests; see launch.progress.draw."""
        last: list[State] = []
        while not end.is_set():
            last = draw_next(folder, ranks, end, console, last)
            if console.is_terminal and not end.is_set():
                with Live(console=console, transient=True, auto_refresh=False) as live:
                    self._follow(folder, last, end, live)
            else:
                self._follow(folder, last, end, console)
        self.hear(read_record(folder))

    def _follow(
        self, folder: Path, last: list[State], end: threading.Event, where: Live | Console
    ) -> None:
        """Until the job ends, or its ranks begin again."""
        told = self.seconds
        while not end.wait(PERIOD) and read_all(folder) == last:
            self.hear(read_record(folder))
            if isinstance(where, Live):
                where.update(self.picture(), refresh=True)
            elif self.seconds - told >= LINES:
                told = self.seconds
                where.print(self.line(), highlight=False)

    def hear(self, state: State) -> None:
        """Rank 0's latest record: requests done, and as `kept` tokens written. One that is younger
        than the last is of another attempt."""
        if state == NOTHING or state == self._state:
            return
        old = self._state if state.seconds >= self._state.seconds else NOTHING
        self.done = state.done
        self.tokens += state.kept - old.kept
        self.seconds += state.seconds - old.seconds
        self._state = state
        self._heard.append((self.seconds, self.tokens))
        while self.seconds - self._heard[0][0] > WINDOW and len(self._heard) > 2:
            self._heard.popleft()

    @property
    def rate(self) -> float:
        """Tokens a second, lately."""
        (begin, first), (end, last) = self._heard[0], self._heard[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    @property
    def left(self) -> str:
        """How long the rest takes."""
        if self.done == self.before:
            return ""
        left = self.seconds * (self.total - self.done) / (self.done - self.before)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"

    def picture(self) -> Table:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=max(1, self.total), completed=self.done)
        figures = (f"{self.done:,}/{self.total:,}", f"{self.rate:,.0f} tokens/s", self.left)
        table.add_row("requests", bar, *figures)
        return table

    def line(self) -> str:
        said = (f"{self.done:,} of {self.total:,} requests", f"{self.rate:,.1f} tokens a second")
        return ", ".join(filter(None, (*said, self.left)))

    def summary(self) -> str:
        """`60 requests, 1,920 tokens in 3.21 s: 598.1 tokens a second; 40 were done before`."""
        requests = self.done - self.before
        word = "request" if requests == 1 else "requests"
        rate = self.tokens / self.seconds if self.seconds else 0.0
        said = (
            f"{requests:,} {word}, {self.tokens:,} tokens in {self.seconds:.2f} s: "
            f"{rate:,.1f} tokens a second"
        )
        if not self.before:
            return said
        return f"{said}; {self.before:,} {'was' if self.before == 1 else 'were'} done before"


def read_record(folder: Path) -> State:
    try:
        return State(0, *json.loads((folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return NOTHING
