"""`tpx launch` with real ranks: what a script sees, and how a job ends. Each launch takes seconds,
so those that only wait for imports run side by side."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest
from launching import environment, finish, start, tpx, write_script
from tiny import tiny_checkpoint

SAYS_WHAT_IT_SEES = """
    import json, os, sys
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0" and os.environ["RANK"] == "1":
        raise ValueError("only the first time")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS",
             "TPX_RUN_DIR", "TPX_MODEL", "TPX_TP_PLAN")
    if attempt == "1":
        print(json.dumps([sys.argv[1:], "tpx" in sys.modules, *map(os.environ.get, names)]))
"""
RAISES_WHILE_THE_OTHER_WAITS = """
    import os, signal
    def step(x):
        raise ValueError("boom")
    if os.environ["RANK"] == "1":
        step(1)
    signal.pause()
"""
IS_KILLED = """
    import os, signal
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
"""
EXITS = """
    import os, signal, sys
    if os.environ["RANK"] == "1":
        sys.exit(9)
    signal.pause()
"""
WAITS = """
    import os, signal
    print(os.getpid())
    while True:
        signal.pause()
"""
PRINTS = """
    while True:
        print("line")
"""
USES_ITS_OWN_GROUP = """
    import os, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    mine = id(dist.group.WORLD)  # a reference would outlive it: torch then aborts at exit, often
    import tpx
    with tpx.LLM() as llm:
        [logits] = llm.logits([[1, 2, 3]])
        tokens = llm.generate([[1, 2, 3]], tpx.SamplingParams(max_tokens=4, ignore_eos=True))
    assert id(dist.group.WORLD) == mine and dist.is_initialized()
    if dist.get_rank() == 0:
        print(tuple(logits.shape), len(tokens[0].token_ids), llm.report.mesh.world)
        print(os.environ["TPX_TP_PLAN"])
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def pids(process: subprocess.Popen[str]) -> list[int]:
    """Those that the script WAITS prints."""
    assert process.stdout is not None
    return [int(process.stdout.readline()) for _ in range(2)]


def wait_until_gone(found: list[int]) -> None:
    """Returns once none of them runs."""
    for pid in found:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([descriptor], [], [], 10)
        os.close(descriptor)
        assert ended, f"process {pid} runs on"


def test_any_script_runs_and_is_started_again(tmp_path):
    script = write_script(tmp_path, SAYS_WHAT_IT_SEES)
    env = environment(TPX_MODEL="named/before")
    del env["OMP_NUM_THREADS"]
    words = ("--nproc_per_node=2", "--max-restarts", 1, "--run-dir", "out")
    done = tpx("launch", *words, script, "$HOME", "$$", "", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    seen = sorted(json.loads(line) for line in done.stdout.splitlines())
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank in range(2):
        assert seen[rank] == [["$HOME", "$$", ""], False, str(rank), str(rank), "2", "2", threads,
                              str(tmp_path / "out"), "named/before", None]  # fmt: skip
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == [
        "errors",
        "events.jsonl",
        "preflight.json",
        "rank0.out",
        "rank1.out",
        "run.json",
    ]


@pytest.mark.more
def test_one_rank_raises_and_one_error_names_it(tmp_path):
    script = write_script(tmp_path, RAISES_WHILE_THE_OTHER_WAITS)
    done = tpx("launch", script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        "error: rank 1 raised `ValueError: boom`\n\n"
        "Traceback (most recent call last):\n"
        f'  File "{script}", line 5, in <module>\n'
        "    step(1)\n"
        f'  File "{script}", line 3, in step\n'
        '    raise ValueError("boom")\n'
        "ValueError: boom\n\n"
        "1 other rank ended with it\n"
    )


@pytest.mark.soak
def test_a_kill_and_an_exit_code_in_two_jobs_at_once(tmp_path):
    killed = start("launch", write_script(tmp_path, IS_KILLED, "killed.py"), cwd=tmp_path)
    exited = start("launch", write_script(tmp_path, EXITS, "exits.py"), cwd=tmp_path)
    done = finish(killed)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("error: rank 1 was killed by `SIGKILL`\n\nhint: ")
    done = finish(exited)
    assert (done.returncode, done.stdout) == (9, "")
    assert done.stderr == "error: rank 1 ended with exit code 9\n"


@pytest.mark.soak
def test_signals_end_all_ranks(tmp_path):
    script = write_script(tmp_path, WAITS)
    jobs = [start("launch", "--nproc", 2, script, cwd=tmp_path) for _ in range(3)]
    started = [pids(job) for job in jobs]
    for job, number in zip(jobs, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), strict=True):
        job.send_signal(number)
    ends = [finish(job) for job in jobs]
    assert [(done.returncode, done.stderr) for done in ends] == [
        (130, "interrupted: all ranks have ended\n"),
        (143, "stopped by SIGTERM: all ranks have ended\n"),
        (-signal.SIGKILL, ""),
    ]
    for ranks in started:
        wait_until_gone(ranks)


@pytest.mark.more
def test_a_pager_that_closes_ends_the_job_in_silence(tmp_path):
    job = start("launch", write_script(tmp_path, PRINTS), cwd=tmp_path)
    assert job.stdout is not None
    assert job.stderr is not None
    assert job.stdout.readline() == "line\n"
    job.stdout.close()
    assert (job.wait(60), job.stderr.read()) == (141, "")
    job.stderr.close()


@pytest.mark.more
def test_the_library_uses_a_group_that_the_script_made(tmp_path, tiny):
    script = write_script(tmp_path, USES_ITS_OWN_GROUP)
    done = tpx("launch", "--model", tiny, "--tp-plan", "auto", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shape, plan = done.stdout.splitlines()
    assert shape == "(3, 263) 4 2"
    assert Path(plan).parent.parent == tmp_path / "runs"
    assert Path(plan).name == "plan.yaml"
    assert Path(plan).read_text().count("\ntpx: 1\n") == 1


@pytest.mark.more
def test_without_a_script_text_is_written_and_the_report_beside_it(tmp_path, tiny):
    words = ("--model", tiny, "--prompt", "the", "--prompt", "end", "--max-new-tokens", 5)
    done = tpx("launch", *words, "--tp-plan", "tp2-ep2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the")
    assert "\n\nend" in done.stdout
    lines = [line.split() for line in done.stderr.splitlines()]
    assert ["mesh", "tp", "2", "x", "ep", "2,", "plan", "plans/gpt_oss/tp2-ep2.yaml"] in lines
    ranks = [line for line in lines if line[:2] in (["0", "tp"], ["1", "tp"])]
    assert [rank[:6] for rank in ranks] == [
        ["0", "tp", "0,", "ep", "0", "cpu"], ["1", "tp", "1,", "ep", "1", "cpu"]
    ]  # fmt: skip
    read = [int(rank[6].replace(",", "")) for rank in ranks]
    total = next(line for line in lines if line[:1] == ["all"])
    assert int(total[1].replace(",", "")) == sum(read) > 10_000
    assert lines[-1][0].isdecimal()
    assert lines[-1][-3:] == ["tokens", "a", "second"]
