"""`tpx generate` on two real ranks: the disk is full, then the job is killed, then it goes on."""

from __future__ import annotations

import json
import resource
import select
import signal
import subprocess
from pathlib import Path

import pytest
from launching import ROOT, finish, start, tpx
from tiny import open_llm

from tpx import Request, SamplingParams

MODEL = ROOT / "examples" / "models" / "tpx-demo"
COUNT = 9
FULL = 40_000  # bytes that a file may have at first
COMMAND = ("generate", "--model", MODEL, "--input", "in.jsonl", "--output", "out.jsonl",
           "--nproc", 2, "--device", "cpu", "--dtype", "float32")  # fmt: skip
PLAN = ("--tp-plan", "tp2-etp2")
GOES_ON = f"of {COUNT} requests are in `out.jsonl`: the same command goes on from there\n"


def asked(number: int) -> dict:
    """Each ends some time after the one before; every third is drawn."""
    drawn = {"temperature": 0.9, "seed": number} if number % 3 == 0 else {}
    return {"max_tokens": 4 + 5 * number, "logprobs": 20, "ignore_eos": True, **drawn}


def results(path: Path) -> dict[int, dict]:
    """What is in whole lines, each id once."""
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    found = {one["id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


def kill_once_there_are(count: int, job: subprocess.Popen[str], target: Path) -> None:
    """Results."""
    assert job.stderr is not None
    while len(results(target)) < count:
        assert job.poll() is None, job.stderr.read()
        select.select([], [], [], 0.02)
    job.send_signal(signal.SIGKILL)
    finish(job)


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))


def one_run() -> dict[int, tuple[str, list[int]]]:
    """What an uninterrupted one gives."""
    with open_llm(MODEL, "tp1") as llm:
        requests = [Request(f"A list of {n}", SamplingParams(**asked(n))) for n in range(COUNT)]
        found = {one.id: one.completions[0] for one in llm.generate_batch(requests)}
    return {name: (one.text, one.token_ids) for name, one in found.items()}


@pytest.mark.more
def test_a_job_that_is_stopped_goes_on_to_what_one_run_gives(tmp_path):
    lines = [{"prompt": f"A list of {number}", **asked(number)} for number in range(COUNT)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    target = tmp_path / "out.jsonl"
    full = finish(start(*COMMAND, cwd=tmp_path, preexec_fn=limit))
    first = target.read_text()
    count = len(results(target))
    assert 1 <= count < COUNT
    assert first.endswith("\n")
    assert full.returncode == 4, full.stderr
    assert full.stderr.endswith(
        f"error: rank 0: `{target}` cannot be written: File too large\n\n"
        f"hint: make room, and type the same command: what is in the file is kept\n"
        f"{count} {GOES_ON}"
    )
    kill_once_there_are(count + 1, start(*COMMAND, cwd=tmp_path), target)
    second = target.read_text()
    count = len(results(target))
    assert count < COUNT
    assert second.startswith(first)
    on = tpx(*COMMAND, *PLAN, cwd=tmp_path)
    assert (on.returncode, on.stdout) == (0, ""), on.stderr
    assert "plan plans/gpt_oss/tp2-etp2.yaml\n" in on.stderr
    last = on.stderr.splitlines()[-1]
    assert last.startswith(f"{COUNT - count} requests, ")
    assert last.endswith(f"; {count} were done before")
    assert target.read_text().startswith(second.rpartition("\n")[0])
    found = {name: one["completions"][0] for name, one in results(target).items()}
    assert {name: (one["text"], one["token_ids"]) for name, one in found.items()} == one_run()
    again = tpx(*COMMAND, cwd=tmp_path)
    nothing = f"nothing to do: all {COUNT} requests of `in.jsonl` are in `out.jsonl`\n"
    assert (again.returncode, again.stderr) == (0, nothing)
