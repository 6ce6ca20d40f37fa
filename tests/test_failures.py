"""Each way in which a job can fail, under `tpx launch`: one error that names the rank and says why,
its exit code, few lines, and no process that stays. scripts/failure_suite.py has the table, and
torchrun beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from failure_rows import ROWS, Row
from failure_suite import Found, missing, run_row
from tiny import tiny_checkpoint

SOAK = 20
NAMED = {row.name: row for row in ROWS}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def check(name: str, folder: Path, model: Path) -> None:
    row = NAMED[name]
    reason = missing(row)
    if reason is not None:
        pytest.skip(reason)
    found = run_row(row, True, folder, model)
    assert found.wrong(row) == [], found.text


@pytest.mark.more
@pytest.mark.parametrize("name", NAMED)
def test_a_job_that_fails_says_why(name, tmp_path, model):
    check(name, tmp_path, model)


@pytest.mark.soak
@pytest.mark.parametrize("time", range(SOAK))
@pytest.mark.parametrize("name", NAMED)
def test_a_job_that_fails_says_why_each_time(name, time, tmp_path, model):
    check(name, tmp_path, model)


@pytest.mark.parametrize(
    "change",
    [{"code": 1}, {"rank": 0}, {"lines": 26}, {"seconds": 5.1}, {"left": 1}, {"text": "error: x"},
     {"text": "error: rank 1 raised `ValueError: boom`\ntpx/launch/watch.py"}],
)  # fmt: skip
def test_what_is_not_as_it_must_be_is_seen(change):
    row = Row("one", 4, told="raised `ValueError: boom`")
    good = Found(4, 1, 25, 5.0, 0, "error: rank 1 raised `ValueError: boom`\n")
    assert good.wrong(row) == []
    assert len(good._replace(**change).wrong(row)) == 1
