"""Two ranks on two GPUs, over NCCL: what one rank gives, by every plan, with graphs and without.

rank_jobs.py has what the ranks run. TPX_TEST_DEVICE=cpu runs the same tests on two CPU ranks over
gloo, where nothing is captured: to try the tests.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failure_rows import MODEL, Row
from failure_suite import watch
from launching import ROOT, TPX, environment
from rank_jobs import DEVICE, __file__ as SCRIPT
from tiny import tiny_checkpoint

if DEVICE == "cuda":
    few = torch.cuda.device_count() < 2
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(few, reason="needs two CUDA devices")]
ON_GPU = {  # sizes that the kernels are made for
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
BOUND = 5e-5  # of the largest logit: float32, added in another order
HANG, LIMIT = 30, 200  # seconds: without progress, of a job; a start may compile for most of them
END = 40  # of a job whose kernels are compiled
# A name is a plan, and `eager` where its decode steps are no graphs. A job opens several in turn.
JOBS = (
    ("tp2", "tp2-ep2", "tp2-ep2 eager", "tp2-etp2", "ep2"),
    ("dp2-ep2-gather", "dp2-ep2-gather eager", "dp2-ep2", "auto"),
)
NAMES = [name for names in JOBS for name in names]
CALLS = {  # collectives of layers, beside those of embedding and head
    "tp2": {"attention"},
    "tp2-ep2": {"attention", "moe.combine"},
    "tp2-etp2": {"attention", "moe.combine"},
    "ep2": {"moe.combine"},
    "dp2-ep2-gather": {"moe.gather_tokens", "moe.scatter"},
    "dp2-ep2": {"moe.counts", "moe.tokens", "moe.return"},
}


def command(*words: object) -> list[str]:
    return [*TPX, "launch", "--device", DEVICE, "--hang-timeout", str(HANG), *map(str, words)]


def variables() -> dict[str, str]:
    """Of the ranks: they import what is imported here, and see the same GPUs."""
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    if DEVICE == "cuda":
        del env["CUDA_VISIBLE_DEVICES"]
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        env |= {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    return env


def run(job: str, model: Path, out: Path, *names: str, ranks: int = 2, limit: int = LIMIT) -> Path:
    """Ends well, and in time: `limit` seconds."""
    out.mkdir(exist_ok=True)
    words = command("--nproc", ranks, "--run-dir", out / "run", SCRIPT, job, model, out, *names)
    began = time.monotonic()
    try:
        done = subprocess.run(words, cwd=out, env=variables(), capture_output=True, text=True,
                              timeout=limit)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        written = sorted(path.name for path in out.glob("*.json"))
        pytest.fail(f"no end after {limit} s, {written=}: {error.stderr!r}")
    print(f"{job} {' '.join(names)}: {time.monotonic() - began:.1f} s")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = ON_GPU if DEVICE == "cuda" else {}
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), seed=1, **changes)


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """What a plan gave, by name. A job that failed keeps what it had found before."""

    @functools.cache
    def job(number: int) -> tuple[Path, str]:
        out, ranks = tmp_path_factory.mktemp("job"), 1 if number < 0 else 2
        try:
            run("generates", model, out, *(JOBS[number] if ranks == 2 else ["tp1"]), ranks=ranks)
        except (AssertionError, pytest.fail.Exception) as error:
            return out, str(error)
        return out, ""

    def answer(name: str) -> dict[str, Any]:
        out, fault = job(next((n for n, names in enumerate(JOBS) if name in names), -1))
        path = out / f"{name}.json"
        assert path.exists(), fault
        return json.loads(path.read_text())

    return answer


def test_collectives_move_and_add_what_they_are_given(model, tmp_path):
    out = run("sends", model, tmp_path / "job")
    assert json.loads((out / "sent.json").read_text()) == [[], []]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_gives_the_logits_and_tokens_of_one_rank(name, answers):
    found, expected = answers(name), answers("tp1")
    for ours, theirs in zip(found["logits"], expected["logits"], strict=True):
        ours, theirs = torch.tensor(ours), torch.tensor(theirs)
        assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max()
    assert found["greedy"] == expected["greedy"]
    assert found["drawn"] == expected["drawn"]
    assert CALLS.get(name.partition(" ")[0], set()) <= {*found["calls"]}
    captures = DEVICE == "cuda" and "eager" not in name and found["decode"] != "all_to_all"
    assert bool(found["graphs"]) == captures


def test_one_rank_reads_for_both(model, tmp_path):
    found = json.loads((run("exchanges", model, tmp_path / "job") / "exchanged.json").read_text())
    assert [same for same, _ in found] == [1, 1]
    assert sum(received for _, received in found) > 0


def test_coroutines_are_served_and_the_job_ends(model, tmp_path, answers):
    out = run("serves", model, tmp_path / "job", limit=END)
    assert json.loads((out / "served.json").read_text()) == answers("tp1")["greedy"]


def test_a_script_that_closes_nothing_ends(model, tmp_path):
    run("leaves_open", model, tmp_path / "job", limit=END)


FAILS = """
    import rank_jobs
    llm = rank_jobs.open_llm(str(HERE / "model"), "tp2")
    step, steps = llm.session.step, iter(range(100))
    def counted():
        if next(steps) == 20 and RANK == 1:
            fault()
            act()
        return step()
    llm.session.step = counted
    llm.generate([[1, 2, 3]], rank_jobs.GREEDY)
"""
KILLED = """
    act = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""
RAISES = """
    def act():
        raise ValueError("boom")
"""


@pytest.mark.parametrize(
    "row",
    [
        Row("killed", 5, (MODEL, KILLED, FAILS), told="was killed by `SIGKILL`"),
        Row("raises", 4, (MODEL, RAISES, FAILS), told="raised `ValueError: boom`"),
    ],
    ids=lambda row: row.name,
)
def test_a_rank_that_fails_while_it_generates_ends_the_job(row, model, tmp_path):
    (tmp_path / "model").symlink_to(model)
    script = tmp_path / "script.py"
    script.write_text(row.text())
    with (tmp_path / "stderr").open("wb") as error:
        process = subprocess.Popen(
            command("--nproc", 2, script), cwd=tmp_path, env=variables(), stderr=error,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found = watch(row, process, tmp_path)
    print(f"{row.name}: {found.seconds:.1f} s from the fault to the last process")
    assert found.wrong(row) == [], found.text
