"""Records of progress, and the one bar or line that they make."""

from __future__ import annotations

import io
import json
import os
import threading

import pytest
from rich.console import Console

from tpx.launch.progress import (
    Rates,
    State,
    Writer,
    announce,
    draw,
    draw_next,
    draw_once,
    is_done,
    launcher_draws,
    picture,
    read_all,
    sum_up,
    summary,
    wait_until_erased,
)  # fmt: skip


def screen(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, legacy_windows=False)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def write(folder, rank: int, done: int, total: int) -> Writer:
    writer = Writer(folder / str(rank))
    writer.update("load", done, total, total)
    return writer


def test_the_latest_record_counts(tmp_path):
    writer = write(tmp_path, 1, 123456, 10**9)
    write(tmp_path, 0, 1, 2)
    writer.update("load", 7, 10**9, 5)
    found = [state[:5] for state in read_all(tmp_path)]
    assert found == [(0, "load", 1, 2, 2), (1, "load", 7, 10**9, 5)]
    assert all(len(path.read_bytes()) == 128 for path in tmp_path.iterdir())


def test_a_disk_that_is_full_does_not_stop_the_work(tmp_path):
    (tmp_path / "0").symlink_to("/dev/full")
    write(tmp_path, 0, 1, 2).close()
    with (tmp_path / "0").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.write(b"x")


def test_a_rank_that_has_written_nothing_has_no_state(tmp_path):
    Writer(tmp_path / "0")
    (tmp_path / "1").write_text('["load", 1')
    (tmp_path / "2").write_text(json.dumps(["load", 1]))
    (tmp_path / "drawing").touch()
    assert read_all(tmp_path) == []
    assert read_all(tmp_path / "missing") == []


def test_work_is_done_when_all_ranks_are():
    done, half = State(0, "load", 5, 5, 5, 1.0), State(1, "load", 2, 5, 5, 1.0)
    assert not is_done([done], 2)
    assert not is_done([done, half], 2)
    assert is_done([done, done], 2)
    assert is_done([State(0, "load", 0, 0, 0, 0.0)], 1)


def test_ranks_that_have_not_begun_count_like_the_others():
    assert sum_up([State(0, "load", 2, 10, 10, 0.0)], 4) == (2, 40)
    assert sum_up([], 4) == (0, 0)


def test_the_summary_is_of_the_slowest_rank():
    states = [
        State(0, "load", 10**6, 10**6, 10**6, 0.5),
        State(1, "load", 10**6, 10**6, 10**6, 1.25),
    ]
    assert summary(states) == (
        "load: 2.0 MB on 2 ranks in 1.2 s, 1.6 MB/s, read 1.00x of what is kept"
    )
    assert summary(states[:1]) == (
        "load: 1.0 MB on 1 rank in 0.5 s, 2.0 MB/s, read 1.00x of what is kept"
    )


def test_the_summary_tells_what_was_read_for_nothing():
    states = [State(rank, "load", 10**10, 10**10, 4 * 10**9, 4.0) for rank in range(4)]
    assert summary(states) == (
        "load: 40.00 GB on 4 ranks in 4.0 s, 10.0 GB/s, read 2.50x of what is kept"
    )
    assert summary([State(0, "load", 0, 0, 0, 0.0)]) == "load: 0.0 MB on 1 rank in 0.0 s, 0.0 MB/s"


def test_a_rate_is_of_the_last_seconds():
    rates = Rates()
    for second, done in enumerate([0, 900, 900, 900, 1000]):
        rates.hear([State(0, "load", done, 1000, 1000, 0.0)], float(second))
    assert rates.of(0) == 50.0  # of the last two seconds, in which 100 bytes came
    assert rates.of(1) == 0.0
    rates.hear([State(0, "load", 10, 1000, 1000, 0.0)], 5.0)  # other work began
    assert rates.of(0) == 0.0


def rows(states: list[State], ranks: int) -> list[str]:
    """As 80 columns show them, a second in which each rank read 400 MB after they began."""
    rates = Rates()
    rates.hear([state._replace(done=state.done - 4 * 10**8) for state in states], 0.0)
    rates.hear(states, 1.0)
    console = screen(terminal=False)
    console.print(picture(states, ranks, rates))
    lines = shown(console).splitlines()
    assert max(map(len, lines)) <= 80
    return [" ".join(word for word in line.split() if word[0] not in "━╸╺") for line in lines]


def test_a_job_of_few_ranks_has_a_row_for_each():
    states = [
        State(rank, "load", done, 2 * 10**9, 1, 1.0) for rank, done in [(0, 10**9), (2, 2 * 10**9)]
    ]
    assert rows(states, 3) == [
        "load 3.00/6.00 GB 800.0 MB/s",
        "rank 0 1.00/2.00 GB 400.0 MB/s",
        "rank 1 waits",
        "rank 2 2.00/2.00 GB done",
    ]
    assert rows(states[:1], 1) == ["load 1.00/2.00 GB 400.0 MB/s"]
    assert len(rows([], 8)) == 9


def test_a_job_of_many_ranks_has_its_slowest_its_fastest_and_their_mean():
    states = [State(rank, "load", (rank + 5) * 10**8, 2 * 10**9, 1, 1.0) for rank in range(9)]
    assert rows(states, 9) == [
        "load 8.10/18.00 GB 3.6 GB/s",
        "slowest rank 0 0.50/2.00 GB 400.0 MB/s",
        "fastest rank 8 1.30/2.00 GB 400.0 MB/s",
        "mean of 9 ranks 0.90/2.00 GB 400.0 MB/s",
    ]
    assert rows([], 9) == ["0.00/0.00 MB 0.0 MB/s"]


def test_without_a_terminal_there_is_one_line_each_time(tmp_path):
    console, end = screen(terminal=False), threading.Event()
    announce(tmp_path)
    thread = threading.Thread(target=draw, args=(tmp_path, 2, end, console))
    thread.start()
    for _ in range(2):
        writers = [write(tmp_path, rank, 0, 1000) for rank in range(2)]
        seen = shown(console)
        for writer in writers:
            writer.update("load", 500, 1000, 1000)
            writer.update("load", 1000, 1000, 1000)
        while shown(console) == seen:
            assert thread.is_alive()
    end.set()
    thread.join()
    lines = shown(console).splitlines()
    assert [line.partition(" in ")[0] for line in lines] == ["load: 0.0 MB on 2 ranks"] * 2


def test_on_a_terminal_there_is_a_bar_that_goes_away(tmp_path):
    console, end = screen(terminal=True), threading.Event()
    announce(tmp_path)
    writer = write(tmp_path, 0, 0, 2_000_000)
    thread = threading.Thread(target=draw_next, args=(tmp_path, 1, end, console))
    thread.start()
    writer.update("load", 1_000_000, 2_000_000, 2_000_000)
    while "1.00/2.00 MB" not in shown(console):
        assert thread.is_alive()
    assert (tmp_path / "drawing").exists()
    writer.update("load", 2_000_000, 2_000_000, 2_000_000)
    wait_until_erased(tmp_path)
    thread.join()
    assert not (tmp_path / "drawing").exists()
    assert "\x1b[2K" in shown(console)[-20:]  # the line is erased
    assert " ranks in " not in shown(console)


def test_records_are_removed_once_they_are_drawn(tmp_path, capsys):
    folder = tmp_path / "job"
    write(folder, 0, 5_000_000, 5_000_000)
    draw_once(folder, 1)
    assert capsys.readouterr().err.startswith("load: 5.0 MB on 1 rank in ")
    assert not folder.exists()


def test_drawing_ends_with_the_job_whatever_the_ranks_have_done(tmp_path):
    console, end = screen(terminal=True), threading.Event()
    write(tmp_path, 0, 1, 2)
    thread = threading.Thread(target=draw, args=(tmp_path, 1, end, console))
    thread.start()
    end.set()
    thread.join(10)
    assert not thread.is_alive()


def test_waiting_for_a_bar_has_an_end(tmp_path):
    (tmp_path / "drawing").touch()
    wait_until_erased(tmp_path, limit=0.02)


def test_the_launcher_draws_for_its_own_ranks(tmp_path):
    assert not launcher_draws(tmp_path)
    announce(tmp_path)
    assert not launcher_draws(tmp_path)  # this process announced itself: it is no rank of its own
    (tmp_path / "drawer").write_text(str(os.getppid()))
    assert launcher_draws(tmp_path)
