"""How far requests are: the bar, the lines, and the sum, also of ranks that began again."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from tpx.cli.generate_bar import NOTHING, Bar, read_record
from tpx.launch.progress import State, Writer
from tpx.results_file import PROGRESS


def said(done: int, tokens: int, seconds: float) -> State:
    return State(0, "generate", done, 10, tokens, seconds)


def heard(before: int, *states: State) -> Bar:
    bar = Bar(10, before)
    for state in states:
        bar.hear(state)
    return bar


def test_the_sum():
    assert heard(0).summary() == "0 requests, 0 tokens in 0.00 s: 0.0 tokens a second"
    assert heard(0, said(1, 8, 2.0)).summary() == (
        "1 request, 8 tokens in 2.00 s: 4.0 tokens a second"
    )
    assert heard(1, said(1, 0, 0.0), said(10, 9000, 4.5)).summary() == (
        "9 requests, 9,000 tokens in 4.50 s: 2,000.0 tokens a second; 1 was done before"
    )


def test_ranks_that_began_again_add_to_what_was_done():
    bar = heard(2, said(2, 0, 0.0), said(5, 30, 3.0), NOTHING, said(5, 0, 0.0), said(10, 50, 2.0))
    assert bar.summary() == (
        "8 requests, 80 tokens in 5.00 s: 16.0 tokens a second; 2 were done before"
    )


def test_a_rate_is_of_late_and_what_is_left_is_of_the_whole_job():
    bar = heard(2, said(2, 0, 0.0), said(4, 1000, 20.0), said(6, 1100, 31.0))
    assert bar.line() == "6 of 10 requests, 9.1 tokens a second, 0:00:31 left"
    assert heard(2, said(2, 0, 0.0)).line() == "2 of 10 requests, 0.0 tokens a second"


def test_a_record_that_is_not_there_or_not_whole_says_nothing(tmp_path):
    assert read_record(tmp_path) == NOTHING
    (tmp_path / PROGRESS).write_text('["generate", 1,')
    assert read_record(tmp_path) == NOTHING


class Ranks:
    """One rank that has loaded; each look of the bar at `end` makes a step of its work."""

    def __init__(self, folder: Path, steps: list[tuple[int, int]], seconds: list[float]):
        self.folder, self.steps, self.seconds = folder, steps, seconds
        Writer(folder / "0").update("load", 5, 5, 5)
        self.writer = Writer(folder / PROGRESS)

    def is_set(self) -> bool:
        return not self.steps

    def wait(self, period: float) -> bool:
        if self.steps:
            done, tokens = self.steps.pop(0)
            self.writer._begin = time.monotonic() - self.seconds.pop(0)
            self.writer.update("generate", done, 10, tokens)
        return self.is_set()


@pytest.mark.parametrize("terminal", [True, False])
def test_requests_are_drawn_after_the_load(tmp_path, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, legacy_windows=False)
    bar, ranks = Bar(10, 0), Ranks(tmp_path, [(0, 0), (3, 90), (6, 180), (10, 300)], [0, 5, 11, 15])
    bar.draw(tmp_path, 1, ranks, console)  # type: ignore[arg-type]
    assert bar.summary().startswith("10 requests, 300 tokens in 15.0")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    if terminal:
        assert " 3/10 18 tokens/s 0:00:12 left" in shown
        assert shown.endswith("\x1b[2K")  # the bar goes away
    else:
        load, line = shown.splitlines()
        assert load.startswith("load: 0.0 MB on 1 rank in ")
        assert line == "6 of 10 requests, 15.0 tokens a second, 0:00:07 left"


def test_a_bar_ends_with_its_job(tmp_path):
    bar, end = Bar(10, 0), threading.Event()
    thread = threading.Thread(target=bar.draw, args=(tmp_path, 2, end, Console(file=io.StringIO())))
    thread.start()
    end.set()
    thread.join(10)
    assert not thread.is_alive()
