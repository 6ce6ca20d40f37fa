"""What is left of a job that ended: nothing that its ranks started, and no trace of a hang that a
new attempt made good."""

from __future__ import annotations

import json

import pytest
from launching import tpx, write_script
from test_launch_ranks import wait_until_gone

STARTS_ANOTHER = """
    import os, subprocess, sys
    from pathlib import Path
    if os.environ["RANK"] == "1":
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        Path("child").write_text(str(child.pid))
        sys.exit(int(sys.argv[1]))
"""
HANGS_ONCE = """
    import os, time, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(600)
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.more
def test_what_a_rank_has_started_ends_with_a_job_that_fails(tmp_path):
    script = write_script(tmp_path, STARTS_ANOTHER)
    done = tpx("launch", "--device", "cpu", script, 9, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (9, "error: rank 1 ended with exit code 9\n")
    wait_until_gone([int((tmp_path / "child").read_text())])


@pytest.mark.soak
def test_a_job_that_hung_is_started_again(tmp_path):
    script = write_script(tmp_path, HANGS_ONCE)
    words = ("--device", "cpu", "--max-restarts", 1, "--hang-timeout", 2, "--run-dir", "out")
    done = tpx("launch", *words, script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("hang") == 1
    assert {event["attempt"] for event in events if event["event"] == "rank"} == {0, 1}
