"""What ranks print: whole lines, alike ones once, in files, and through to whoever reads."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import IO

import pytest
from launching import tpx, write_script
from rich.console import Console

from tpx.launch.lines import BAR, HOLD, MOST, Lines, spans
from tpx.launch.logs import Logs, Raw, Shown, views


def screen(terminal: bool = True, **settings) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=20, legacy_windows=False, **settings
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def hear(lines: Lines, *said: tuple[int, bytes, float]) -> Lines:
    for rank, data, now in said:
        lines.hear(rank, data, now)
    return lines


def test_what_all_ranks_write_is_one_line_at_once():
    lines = hear(Lines(3), (0, b"a\nb\n", 0.0), (2, b"a\n", 0.0))
    assert lines.take(0.0) == []
    lines.hear(1, b"a\nb\n", 0.01)
    assert lines.take(0.01) == [((0, 1, 2), "a")]
    assert lines.take(0.01 + HOLD) == [((0, 1), "b")]
    assert not lines.waiting


def test_a_line_waits_a_little_for_the_other_ranks_and_keeps_its_place():
    lines = hear(Lines(2), (0, b"a\nb\n", 0.0), (1, b"b\na\n", 0.05))
    assert lines.take(HOLD - 0.001) == []
    assert lines.waiting
    assert lines.take(1.0) == [((0,), "a"), ((0, 1), "b"), ((1,), "a")]


def test_lines_that_are_not_folded_come_as_they_are():
    lines = hear(Lines(2, fold=False), (0, b"a\n", 0.0), (1, b"a\nb", 0.0))
    assert lines.take(0.0) == [((0,), "a"), ((1,), "a")]
    assert lines.take(0.0, end=True) == [((1,), "b")]


def test_bytes_become_lines_whatever_the_pieces():
    text = "é one\ntwo\n\nthree".encode()
    for cut in range(len(text)):
        lines = hear(Lines(1), (0, text[:cut], 0.0), (0, text[cut:], 0.0))
        found = [line for _, line in lines.take(0.0, end=True)]
        assert found == ["é one", "two", "", "three"]


def test_a_bar_is_shown_as_it_ends_and_now_and_then_before():
    lines = hear(Lines(1), (0, b" 1%\r 2%", 0.0), (0, b"\r 3%", BAR / 2))
    assert lines.take(BAR / 2) == []
    lines.hear(0, b"\r 4%", BAR)
    lines.hear(0, b"\r 5%", BAR + 1)
    assert lines.take(BAR + 1) == [((0,), " 4%")]
    lines.hear(0, b"\r100%\r\n", BAR + 2)
    assert lines.take(BAR + 2) == [((0,), "100%")]


def test_a_line_without_end_does_not_grow_for_ever():
    lines = hear(Lines(1), (0, b"x" * (MOST + 1), 0.0))
    assert [len(text) for _, text in lines.take(0.0)] == [MOST + 1]
    assert lines.take(0.0, end=True) == []


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((0,), "r0"), ((0, 1), "r0-1"), (range(8), "r0-7"), ((0, 2, 3, 9), "r0,2-3,9")],
)
def test_ranks_are_named_in_spans(ranks, text):
    assert spans(ranks) == text


def test_prefixes_have_colours_on_a_terminal_that_has_them():
    for console, prefix in (
        (screen(), "\x1b[33m[r1]\x1b[0m"),
        (screen(no_color=True), "[r1]"),
        (screen(terminal=False), "[r1]"),
    ):
        shown = Shown(Lines(2), console)
        shown.hear(1, b"[bold]a long line, 1.5 :smile: " + b"x" * 30 + b"\n", 0.0)
        shown.flush(1.0)
        assert written(console) == f"{prefix} [bold]a long line, 1.5 :smile: {'x' * 30}\n"


def run_logs(folder: Path, ranks: dict[int, int], shown: dict, *said: tuple[int, str, bytes]):
    """Each `said` is written by a local rank as a process of its would."""
    logs = Logs(folder, len(ranks), shown)
    paths = {stream: logs.paths(stream, ranks) for stream in ("out", "err")}
    for local, stream, data in said:
        with open(paths[stream][local], "wb") as file:
            file.write(data)
    logs.close()
    return logs, paths


def test_each_rank_has_its_files_and_one_that_says_nothing_has_none(tmp_path):
    read, write = os.pipe()
    console = screen(terminal=False)
    shown = {"out": Raw(write), "err": Shown(Lines(2), console)}
    said = (0, "out", b"a\nhalf"), (1, "out", b"b\n"), (0, "err", b"c\n"), (0, "out", b" line\n")
    logs, _ = run_logs(tmp_path, {0: 4, 1: 5}, shown, *said)
    os.close(write)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {"rank4.out": b"a\nhalf line\n", "rank5.out": b"b\n", "rank4.err": b"c\n"}
    with open(read, "rb") as file:
        assert sorted(file.read().splitlines()) == [b"a", b"b", b"half line"]
    assert written(console) == "[r4] c\n"
    assert (logs.heard, logs.full) == (16, None)


def test_a_stream_that_is_not_kept_goes_where_the_launchers_goes(tmp_path):
    _, paths = run_logs(tmp_path, {0: 0}, {"err": Shown(Lines(1), screen())})
    assert paths["out"] == {0: ""}
    assert paths["err"][0].startswith("/proc/self/fd/")


def test_text_that_is_not_ended_is_passed_on_soon():
    read, write = os.pipe()
    raw = Raw(write)
    raw.hear(0, b"one\ntw", 0.0)
    assert os.read(read, 100) == b"one\n"
    raw.hear(0, b"o", 0.02)
    raw.flush(0.03)
    assert raw.waiting
    raw.flush(0.06)
    assert (os.read(read, 100), raw.waiting) == (b"two", False)
    os.close(read)
    os.close(write)


def test_a_disk_that_is_full_is_said_and_does_not_stop_what_is_shown(tmp_path):
    (tmp_path / "rank0.out").symlink_to("/dev/full")
    console = screen(terminal=False)
    logs, _ = run_logs(tmp_path, {0: 0}, {"out": Shown(Lines(1), console)}, (0, "out", b"a\n"))
    assert logs.full == "No space left on device"
    assert written(console) == "[r0] a\n"


def write_for(seconds: float, file: IO[bytes]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        file.write(b"line\n")


def test_where_nobody_reads_the_ranks_are_told(tmp_path):
    read, write = os.pipe()
    os.close(read)
    logs = Logs(tmp_path, 1, {"out": Raw(write)})
    with open(logs.paths("out", {0: 0})[0], "wb", buffering=0) as file:
        with pytest.raises(BrokenPipeError):
            write_for(10, file)
    logs.close()
    os.close(write)


@pytest.mark.parametrize(
    ("prefixes", "generates", "terminal", "kinds"),
    [
        ("auto", False, False, {"out": Raw, "err": Raw}),
        ("auto", False, True, {"out": Shown, "err": Shown}),
        ("always", False, False, {"out": Shown, "err": Shown}),
        ("never", False, True, {"out": Raw, "err": Raw}),
        ("always", True, False, {"out": Raw, "err": Raw}),
        ("auto", True, True, {}),
    ],
)
def test_lines_have_their_rank_on_a_terminal_and_text_has_not(prefixes, generates, terminal, kinds):
    out, err = screen(terminal), screen(terminal)
    found = views(2, prefixes, generates, out, err)
    assert {stream: type(view) for stream, view in found.items()} == kinds


SPEAKS = """
    import os, sys, time
    from pathlib import Path
    Path("here" + os.environ["RANK"]).touch()
    while not (Path("here0").exists() and Path("here1").exists()):
        time.sleep(0.001)
    print("all", flush=True)
    print("mine is", os.environ["RANK"], file=sys.stderr)
"""


@pytest.mark.more
def test_a_run_is_on_record(tmp_path):
    script = write_script(tmp_path, SPEAKS)
    words = ("--nproc", 2, "--device", "cpu", "--prefix", "always", "--run-dir", "out")
    done = tpx("launch", *words, script, "word", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[r0-1] all\n")
    assert sorted(done.stderr.splitlines()) == ["[r0] mine is 0", "[r1] mine is 1"]
    assert (tmp_path / "out/rank1.err").read_text() == "mine is 1\n"
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["command"] == {"kind": "script", "name": str(script), "args": ["word"]}
    assert (run["ranks"], run["exit_code"], run["error"]) == (2, 0, "")
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    told = sorted((event["event"], event.get("rank", -1)) for event in events)
    assert told == [("end", -1), ("ended", 0), ("ended", 1), ("rank", 0), ("rank", 1),
                    ("start", -1)]  # fmt: skip
