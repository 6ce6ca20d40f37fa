"""Two machines with two ranks each, as two network namespaces joined by a cable: they generate what
one rank generates, and a machine that is cut off is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from launching import environment, finish, write_script

import tpx

pytestmark = pytest.mark.more

DEMO = Path(__file__).parent.parent / "examples/models/tpx-demo"
PROMPT, TOKENS, HANG = "# pathlib", 12, 3
CARDS = "tpx0", "tpx1"
ADDRESSES = "10.77.0.1", "10.77.0.2"
GENERATES = """
    import json, sys, tpx
    from pathlib import Path
    prompt, tokens, folder = json.loads(sys.argv[1])
    params = tpx.SamplingParams(max_tokens=tokens)
    llm = tpx.LLM(device="cpu")
    rank = llm.worker.place.rank
    Path(folder, f"text.{rank}").write_text(llm.generate([prompt], params)[0].text)
    Path(folder, f"done.{rank}").touch()
    while True:
        llm.generate([prompt], params)
"""


class Host(NamedTuple):
    """A network namespace with one card. number: of the machine."""

    number: int
    name: str

    def ip(self, *words: str) -> None:
        ip("-n", self.name, *words)

    def launch(self, *words: object, cwd: Path) -> subprocess.Popen[str]:
        """`tpx launch` on this machine, one of two."""
        meeting = ("--nnodes", 2, "--node-rank", self.number, "--master-addr", ADDRESSES[0])
        command = (sys.executable, "-m", "tpx", "launch", "--device", "cpu", "--nproc", 2, *meeting,
                   *words)  # fmt: skip
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *map(str, command)],
            cwd=cwd,
            env=environment(GLOO_SOCKET_IFNAME=CARDS[self.number]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if shutil.which("ip") is None:
        pytest.skip("needs `ip`, of iproute2")
    found = Host(0, f"tpx-{os.getpid()}-0"), Host(1, f"tpx-{os.getpid()}-1")
    made = []
    try:
        for host in found:
            try:
                ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no right to make network namespaces: {error.stderr.decode().strip()}")
            made.append(host)
        peer = ("peer", "name", CARDS[1], "netns", found[1].name)
        found[0].ip("link", "add", CARDS[0], "type", "veth", *peer)
        for host in found:
            host.ip("addr", "add", f"{ADDRESSES[host.number]}/24", "dev", CARDS[host.number])
            host.ip("link", "set", CARDS[host.number], "up")
            host.ip("link", "set", "lo", "up")
        yield found
    finally:
        for host in made:
            ip("netns", "del", host.name)


def test_two_machines_generate_what_one_rank_does_and_one_that_is_cut_off_is_named(tmp_path, hosts):
    script = write_script(tmp_path, GENERATES)
    words = ("--model", DEMO, "--tp-plan", "tp4-ep4", "--hang-timeout", HANG)
    told = json.dumps([PROMPT, TOKENS, str(tmp_path)])
    jobs = [host.launch(*words, "--run-dir", "run", script, told, cwd=tmp_path) for host in hosts]
    with tpx.LLM(DEMO, device="cpu") as llm:
        [alone] = llm.generate([PROMPT], tpx.SamplingParams(max_tokens=TOKENS))
    while len(list(tmp_path.glob("done.*"))) < 4:
        assert all(job.poll() is None for job in jobs), [finish(job) for job in jobs]
        time.sleep(0.01)
    assert {(tmp_path / f"text.{rank}").read_text() for rank in range(4)} == {alone.text}

    cut = time.time()
    hosts[1].ip("link", "set", CARDS[1], "down")
    ends = [finish(job) for job in jobs]
    assert [done.returncode for done in ends] == [6, 6], [done.stderr for done in ends]
    for done, (first, last) in zip(ends, ((0, 1), (2, 3)), strict=True):
        here, others = f"{first} and {last}", "2 and 3" if first == 0 else "0 and 1"
        wait = rf"for ranks {others} of another machine in `.*"
        ahead = rf"rank ({first}|{last}) waits {wait}, rank ({first}|{last}) in a later one"
        said = rf"error: (ranks {here} wait {wait}|{ahead}), and nothing has moved for {HANG} s\n"
        assert re.search(said, done.stderr), done.stderr
    for number in range(2):
        folder = tmp_path / f"run/machine{number}"
        run = json.loads((folder / "run.json").read_text())
        assert (run["node_rank"], run["exit_code"]) == (number, 6)
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        [named] = [event["time"] for event in events if event["event"] == "hang"]
        assert named - cut < HANG + 5
