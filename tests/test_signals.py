"""What is left of a job that ended: nothing that its ranks started, and no trace of a hang that a
new attempt made good."""

from __future__ import annotations

import json
import socket

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
RAISES_ONCE = """
    import os, torch, torch.distributed as dist
    from pathlib import Path
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if os.environ["RANK"] == "1":
        Path(f"port.{attempt}").write_text(os.environ["MASTER_PORT"])
        if attempt == "0":
            raise ValueError("only the first time")
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()  # else torch may abort at exit
"""
HANGS_ONCE = """
    import os, time, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(600)
    dist.all_reduce(torch.ones(1))
"""


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.mark.more
def test_what_a_rank_has_started_ends_with_a_job_that_fails(tmp_path):
    script = write_script(tmp_path, STARTS_ANOTHER)
    done = tpx("launch", "--device", "cpu", script, 9, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (9, "error: rank 1 ended with exit code 9\n")
    wait_until_gone([int((tmp_path / "child").read_text())])


@pytest.mark.more
def test_a_job_is_started_again_at_a_new_port(tmp_path, unused_port):
    """Even where the machines' own port is said."""
    script = write_script(tmp_path, RAISES_ONCE)
    words = ("--device", "cpu", "--max-restarts", 1, "--master-port", unused_port)
    done = tpx("launch", *words, script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    ports = [(tmp_path / f"port.{attempt}").read_text() for attempt in range(2)]
    assert len({*ports, str(unused_port)}) == 3


@pytest.mark.soak
def test_a_job_that_hung_is_started_again(tmp_path):
    script = write_script(tmp_path, HANGS_ONCE)
    words = ("--device", "cpu", "--max-restarts", 1, "--hang-timeout", 2, "--run-dir", "out")
    done = tpx("launch", *words, script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("hang") == 1
    assert {event["attempt"] for event in events if event["event"] == "rank"} == {0, 1}
