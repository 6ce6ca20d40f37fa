"""Which rank is named, in one error, with which exit code."""

from __future__ import annotations

import json

import pytest

from tpx.launch import memory, room
from tpx.launch.elastic import Failure
from tpx.launch.report import Memory, Record, ending, headline, read_records

TERM, KILL = -15, -9


def raised(rank: int, at: int, message: str = "ValueError: boom", **more) -> Record:
    told = {"chain": (message,), "traceback": "short", "full_traceback": "short"}
    return Record(rank, at, "raised", message, **told | more)


def lost(rank: int, at: int) -> Record:
    return raised(rank, at, "RuntimeError: ... Connection closed by peer [127.0.0.1]:1234")


def test_the_earliest_record_is_the_cause():
    failures = [Failure(0, 1), Failure(1, 1)]
    found = ending(failures, [raised(1, 5), raised(0, 7, "KeyError: 'x'")], 2)
    assert found == (
        4, "error: rank 1 raised `ValueError: boom`\n\nshort\n\n1 other rank ended with it"
    )  # fmt: skip


def test_a_rank_that_lost_its_connection_is_not_the_cause():
    failures = [Failure(0, 1), Failure(1, 1)]
    assert ending(failures, [lost(0, 5), raised(1, 7)], 2).text.startswith("error: rank 1 raised")
    assert ending([Failure(0, 1), Failure(1, KILL)], [lost(0, 5)], 2) == (
        5,
        "error: rank 1 was killed by `SIGKILL`\n\n"
        "hint: the kernel kills so when memory runs out: use more ranks, or a smaller model",
    )
    assert ending([Failure(0, 1), Failure(1, 3)], [lost(0, 5)], 2) == (
        3, "error: rank 1 ended with exit code 3"
    )  # fmt: skip


def test_a_loss_inside_another_error_is_a_loss_all_the_same():
    wrapped = raised(0, 5, "MyError: step failed",
                     chain=("MyError: step failed", "RuntimeError: closed by peer"))  # fmt: skip
    assert ending([Failure(0, 1), Failure(1, 1)], [wrapped, raised(1, 9)], 2).text.startswith(
        "error: rank 1 raised"
    )


def test_a_rank_that_was_told_to_end_is_not_the_cause():
    found = ending([Failure(0, TERM), Failure(1, 1)], [raised(1, 7)], 2)
    assert found.text.startswith("error: rank 1 raised")
    found = ending([Failure(0, TERM), Failure(1, -11)], [], 2)
    assert found == (
        5,
        "error: rank 1 was killed by `SIGSEGV`\n\n"
        "hint: `PYTHONFAULTHANDLER=1 tpx launch ...` shows where",
    )


def test_where_all_were_told_to_end_the_first_is_named():
    found = ending([Failure(1, TERM), Failure(0, TERM)], [], 2)
    assert found == (
        5, "error: rank 1 was killed by `SIGTERM`\n\nhint: `SIGTERM` came from outside the job"
    )  # fmt: skip


def test_a_loss_alone_says_where_to_look():
    found = ending([Failure(0, 1)], [lost(0, 5)], 1)
    assert found.exit_code == 4
    assert found.text.endswith(
        "\n\nshort\n\nhint: it waited for another rank; on several machines the cause is on "
        "another one"
    )


def test_a_record_is_worth_more_than_a_kill_that_follows_it():
    """A rank that does not end in time is killed by the launcher itself."""
    assert ending([Failure(0, KILL), Failure(1, 1)], [raised(1, 7)], 2).exit_code == 4


def test_memory_that_ran_out_is_said():
    found = ending([Failure(0, KILL)], [], 1, memory=Memory({0: 61_200_000_000}, ran_out=True))
    assert found.text.endswith(
        "hint: this machine, or its container, ran out of memory with 61.2 GB in use by this rank: "
        "use more ranks, or a smaller model"
    )
    assert "the kernel kills so" in ending([Failure(0, KILL)], [], 1, memory=Memory({0: 5})).text


def test_an_error_that_all_ranks_found_is_shown_as_one():
    def same(rank: int) -> Record:
        return Record(rank, rank, "tpx", "bad `plan`", "do so", 2, full_traceback="frames")

    failures = [Failure(0, 2), Failure(1, 2)]
    assert ending(failures, [same(0), same(1)], 2) == (2, "error: bad `plan`\n\nhint: do so")
    assert ending(failures, [same(1)], 2) == (2, "error: rank 1: bad `plan`\n\nhint: do so")
    assert ending(failures, [same(0), same(1)], 2, full=True) == (
        2, "frames\n\nerror: bad `plan`\n\nhint: do so"
    )  # fmt: skip


def test_frames_that_were_left_out_can_be_asked_for():
    one = raised(0, 1, full_traceback="long")
    assert ending([Failure(0, 1)], [one], 1).text == (
        "error: rank 0 raised `ValueError: boom`\n\nshort\n\nhint: `--traceback` shows every frame"
    )
    assert ending([Failure(0, 1)], [one], 1, full=True).text == (
        "error: rank 0 raised `ValueError: boom`\n\nlong"
    )


@pytest.mark.parametrize("failure", [Failure(0, 141), Failure(0, -13)])
def test_a_closed_output_is_no_error(failure):
    records = [Record(0, 1, "pipe")] if failure.code > 0 else []
    assert ending([failure, Failure(1, TERM)], records, 2) == (141, "")


def test_a_headline_is_one_line_of_some_length():
    assert headline("A: b\nc") == "A: b"
    assert headline("x" * 400) == "x" * 300 + " ..."


def test_records_of_the_last_attempt_count(tmp_path):
    (tmp_path / "errors").mkdir()
    for name, rank, at in (("0-1", 1, 1), ("1-0", 0, 9), ("1-1", 1, 5)):
        data = {"rank": rank, "time_ns": at, "kind": "exit", "exit_code": 3, "class": "SystemExit"}
        (tmp_path / f"errors/{name}.json").write_text(json.dumps(data))
    (tmp_path / "errors/1-2.part").write_text("{")
    assert [(r.rank, r.time_ns) for r in read_records(tmp_path)] == [(1, 5), (0, 9)]


@pytest.mark.parametrize(
    ("line", "file", "text"),
    [
        ("0::/mine", "mine/memory.events", "low 0\noom 2\noom_kill 3\noom_group_kill 0\n"),
        ("0::/from/outside", "memory.events", "oom_kill 3\n"),
        ("4:cpu,memory:/mine", "memory/mine/memory.oom_control", "under_oom 0\noom_kill 3\n"),
        ("4:memory:/mine", "memory/memory.oom_control", "oom_kill_disable 0\noom_kill 3\n"),
    ],
)
def test_kills_for_memory_are_counted_in_both_versions(tmp_path, monkeypatch, line, file, text):
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    monkeypatch.setattr(room, "PROC", tmp_path / "proc")
    assert memory.count_oom_kills() == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpuset:/other\n{line}\n")
    assert memory.count_oom_kills() == 0
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert memory.count_oom_kills() == 3


def test_of_ends_whose_times_are_known_the_first_is_the_cause():
    """A rank that ignores the end of the others is killed by the launcher."""
    assert ending([Failure(0, KILL, 9), Failure(1, 3, 5)], [], 2).text == (
        "error: rank 1 ended with exit code 3"
    )
    assert ending([Failure(0, -6, 9), Failure(1, KILL, 5)], [], 2).exit_code == 5
    found = ending([Failure(0, 1, 9), Failure(1, KILL, 5)], [raised(0, 8)], 2)
    assert found.text.startswith("error: rank 1 was killed by `SIGKILL`")
    found = ending([Failure(0, 1, 6), Failure(1, KILL, 9)], [raised(0, 5)], 2)
    assert found.text.startswith("error: rank 0 raised `ValueError: boom`")
    found = ending([Failure(0, TERM, 7), Failure(1, TERM, 5)], [], 2)
    assert found.text.startswith("error: rank 1 was killed by `SIGTERM`")


def test_other_ranks_are_counted():
    failures = [Failure(rank, 1) for rank in range(4)]
    same = [raised(rank, rank) for rank in range(3)]
    tails = [ending(failures, same[:count], 4).text.rpartition("\n\n")[2] for count in (1, 2, 3)]
    assert tails == [
        "3 other ranks ended with it",
        "1 other rank raised the same, 2 more ended with them",
        "2 other ranks raised the same, 1 more ended with them",
    ]
    assert ending(failures, same, 3).text.endswith("\n\n2 other ranks raised the same")


def test_every_rank_can_be_asked_for_its_traceback():
    records = [raised(0, 1, full_traceback="first"), lost(1, 2)._replace(full_traceback="second")]
    found = ending([Failure(0, 1), Failure(1, 1)], records, 2, full=True)
    assert found.text == (
        "error: rank 0 raised `ValueError: boom`\n\nrank 0:\nfirst\n\nrank 1:\nsecond\n\n"
        "1 other rank ended with it"
    )


@pytest.mark.parametrize(
    "message",
    ["MemoryError", "RuntimeError: [enforce fail] can't allocate memory: you tried to allocate 8",
     "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."],
)  # fmt: skip
def test_memory_that_a_rank_could_not_get_is_said(message):
    assert ending([Failure(0, 1)], [raised(0, 1, message)], 1).text.endswith(
        "\n\nhint: rank 0 ran out of memory: use more ranks, or a smaller model"
    )
