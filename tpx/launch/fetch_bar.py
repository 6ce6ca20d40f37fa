"""How far a download is: a bar on a terminal that goes away, else one line at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn


class FetchBar:
    """Drawn from the first report on: nothing is written where nothing is fetched."""

    def __init__(self, line: bool, console: Console):
        self._line, self._console, self._begin = line, console, time.monotonic()
        self._bar: Progress | None = None

    def report(self, done: int, total: int) -> None:
        """done, total: bytes of this download. Called by one thread at a time."""
        if not self._console.is_terminal:
            if self._line and done >= total:
                seconds = time.monotonic() - self._begin
                said = f"fetch: {total / 1e6:,.1f} MB in {seconds:.1f} s"
                self._console.print(said, highlight=False)
            return
        if self._bar is None:
            columns = TextColumn("fetch"), BarColumn(bar_width=None), DownloadColumn()
            self._bar = Progress(
                *columns, TransferSpeedColumn(), console=self._console, transient=True
            )
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)
        if done >= total:
            self.stop()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def fetch_bar(line: bool = True, console: Console | None = None) -> Iterator[FetchBar]:
    """line: whether to say what was fetched where there is no terminal."""
    bar = FetchBar(line, console or Console(stderr=True))
    try:
        yield bar
    finally:
        bar.stop()
