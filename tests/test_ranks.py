"""The pool of ranks itself: values come back by rank, failures are one error and do not last."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
from ranks import ranks
from torch import distributed


def my_rank(number: int) -> tuple[int, str, int]:
    return distributed.get_rank(), os.environ["RANK"], number


def total() -> float:
    x = torch.tensor([float(distributed.get_rank() + 1)])
    distributed.all_reduce(x)
    return x.item()


def raise_on_one() -> float:
    if distributed.get_rank() == 1:
        raise ValueError("rank one is unwell")
    return total()


def raise_everywhere() -> None:
    raise KeyError(distributed.get_rank())


def die_on_one() -> float:
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return total()


def never_end_on_one() -> float:
    while distributed.get_rank() == 1:
        signal.pause()
    return total()


def leave() -> None:
    sys.exit(3)


def nothing_to_send() -> object:
    return lambda: None


def end_group() -> None:
    distributed.destroy_process_group()


def write() -> None:
    print("out", distributed.get_rank())
    os.write(2, b"err")


def change_environment() -> str | None:
    before = os.environ.get("TPX_MODEL")
    os.environ["TPX_MODEL"] = "changed"
    return before


def pid() -> int:
    return os.getpid()


def draw() -> float:
    return torch.rand(()).item()


def test_values_come_back_by_rank():
    assert ranks(4).run(my_rank, 7) == [(rank, str(rank), 7) for rank in range(4)]
    assert ranks(2).run(total) == [3.0, 3.0]


def test_tensors_travel_both_ways():
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    for y in ranks(2).run(torch.neg, x):
        assert torch.equal(y, -x)


def test_processes_are_kept_and_each_job_starts_alike():
    pids = ranks(2).run(pid)
    assert ranks(2).run(change_environment) == [None, None]
    assert ranks(2).run(change_environment) == [None, None]
    assert ranks(2).run(draw) == ranks(2).run(draw)
    assert ranks(2).run(pid) == pids
    assert len(set(pids)) == 2


def test_what_a_rank_writes_is_captured_by_job():
    outputs = ranks(2).capture(write)
    assert [(o.stdout, o.stderr) for o in outputs] == [("out 0\n", "err"), ("out 1\n", "err")]
    assert [(o.stdout, o.stderr) for o in ranks(2).capture(total)] == [("", ""), ("", "")]


def failure(world: int, fn, **options) -> str:
    """The report of a failing function, which must come long before the group's timeout; the next
    function must find a working pool."""
    began = time.monotonic()
    with pytest.raises(AssertionError) as raised:
        ranks(world).run(fn, **options)
    assert time.monotonic() - began < 30
    assert ranks(world).run(total) == [world * (world + 1) / 2] * world
    return str(raised.value)


def test_one_rank_raises_while_the_others_wait_in_a_collective():
    report = failure(4, raise_on_one)
    assert report.startswith("raise_on_one on 4 ranks: rank 1 failed first\n--- rank 1\n")
    assert "ValueError: rank one is unwell" in report
    for rank in range(4):
        assert f"--- rank {rank}\nTraceback" in report
    assert "--- ranks that returned: []" in report


def test_every_rank_raises():
    report = failure(2, raise_everywhere)
    assert "KeyError: 0" in report
    assert "KeyError: 1" in report


def test_a_rank_is_killed():
    assert "--- rank 1\ndied with exit code -9" in failure(2, die_on_one)


def test_a_rank_that_never_ends_shows_where_it_stands():
    report = failure(2, never_end_on_one, limit=3.0)
    assert report.startswith("never_end_on_one on 2 ranks: no end after 3.0 s")
    assert "in never_end_on_one" in report


def test_leaving_ending_the_group_or_returning_what_cannot_be_sent_is_a_failure():
    assert "nothing_to_send" in failure(2, nothing_to_send)
    assert "SystemExit: 3" in failure(2, leave)
    assert "the function ended the default process group" in failure(2, end_group)
