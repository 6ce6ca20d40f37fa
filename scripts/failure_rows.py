"""The ways in which a job fails, for failure_suite.py: what the ranks run, what is done to them,
and how it must end. Rank 1 is the one at fault, wherever there is one.

A script writes `pid.<rank>` where it starts and `fault` (seconds since the epoch) where it fails.
"""

from __future__ import annotations

import signal
import textwrap
from typing import NamedTuple

HANG = 2  # seconds without progress
HEAD = """
    import os, signal, sys, time
    from datetime import timedelta
    from pathlib import Path
    HERE, RANK = Path(__file__).parent, int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
    (HERE / f"pid.{RANK}").write_text(str(os.getpid()))
    def fault():
        (HERE / "fault").write_text(str(time.time()))
    def everyone_is_here():
        (HERE / f"here.{RANK}").touch()
        while len(list(HERE.glob("here.*"))) < WORLD:
            time.sleep(0.005)
"""
GLOO = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo", timeout=timedelta(seconds=int(os.environ["COLLECTIVE_S"])))
    x = torch.ones(4)
    dist.all_reduce(x)
    def step(act):
        if RANK == 1:
            fault()
            act()
        dist.all_reduce(x)
"""
RAISES = """
    def boom():
        raise ValueError("boom")
    step(boom)
"""
ALL_RAISE = """
    everyone_is_here()
    fault()
    raise ValueError("boom")
"""
SLEEPS = """
    step(lambda: time.sleep(600))
"""
LOOPS = """
    def spin():
        while True:
            pass
    step(spin)
"""
DIFFERS = """
    if RANK == 1:
        fault()
        dist.all_gather([torch.empty(4) for _ in range(WORLD)], x)
    else:
        dist.all_reduce(x)
"""
MODEL = """
    import tpx
    from tpx.models import load
    def kill_rank_1():
        if RANK == 1:
            fault()
            os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_LOADING = """
    class Files(load.Files):
        def preadv(self, file, buffers, offset):
            everyone_is_here()
            kill_rank_1()
            return super().preadv(file, buffers, offset)
    load.Files = Files
    tpx.LLM(HERE / "model", "tp2", device="cpu")
"""
KILLED_GENERATING = """
    llm = tpx.LLM(HERE / "model", "tp2", device="cpu")
    for number, piece in enumerate(llm.stream([1, 2, 3], tpx.SamplingParams(ignore_eos=True))):
        if number == 2:
            kill_rank_1()
"""
NO_ADDRESS_SPACE = """
    import resource
    everyone_is_here()
    if RANK == 1:
        fault()
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bytearray(1 << 31)
    signal.pause()
"""
NO_MEMORY = """
    everyone_is_here()
    if RANK == 1:
        fault()
        held = [bytearray(b"x" * (1 << 20)) for _ in range(4096)]
    signal.pause()
"""
WAITS = """
    everyone_is_here()
    fault()
    while True:
        signal.pause()
"""
DOES_NOT_END = """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
PRINTS_3_MB = """
    fault()
    for _ in range(3000):
        print("x" * 999)
"""
PRINTS_AND_RAISES = """
    everyone_is_here()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        print(("y" * 99 + "\\n") * 1000, end="")
        time.sleep(0.1)
        if RANK == 1 and end - time.monotonic() < 0.5:
            fault()
            raise ValueError("boom")
"""


class Row(NamedTuple):
    """script: the parts of what the ranks run. signals: sent to the launcher once the ranks have
    written `fault`, half a second apart. flags: of tpx launch; `PORT` is one that is in use (busy)
    or that nobody listens at. told: by the error, beside the rank. needs: what the machine must
    allow, `cgroup` or `mount`."""

    name: str
    code: int
    script: tuple[str, ...] = (WAITS,)
    rank: int | None = 1
    ranks: int = 2
    signals: tuple[signal.Signals, ...] = ()
    flags: tuple[str, ...] = ()
    busy: bool = False
    told: str = ""
    needs: str = ""
    hangs: bool = False

    def text(self) -> str:
        return "\n".join(textwrap.dedent(part) for part in (HEAD, *self.script))

    @property
    def loads(self) -> bool:
        return MODEL in self.script


ELSEWHERE = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port",
             "PORT", "--rdzv-conf", "timeout=2")  # fmt: skip
ROWS = (
    Row("exception on one rank", 4, (GLOO, RAISES), told="raised `ValueError: boom`"),
    Row("exception on all ranks", 4, (ALL_RAISE,), rank=None, told="1 other rank raised the same"),
    Row("killed while loading", 5, (MODEL, KILLED_LOADING), told="was killed by `SIGKILL`"),
    Row("killed while generating", 5, (MODEL, KILLED_GENERATING), told="was killed by `SIGKILL`"),
    Row("no address space", 4, (NO_ADDRESS_SPACE,), told="rank 1 ran out of memory"),
    Row("memory of a cgroup", 5, (NO_MEMORY,), told="ran out of memory", needs="cgroup"),
    Row("asleep before a collective", 6, (GLOO, SLEEPS), hangs=True, told="time.sleep(600)"),
    Row("endless loop", 6, (GLOO, LOOPS), hangs=True, told="in `spin`"),
    Row("different collectives", 6, (GLOO, DIFFERS), ranks=3, hangs=True,
        told="rank 1 `all_gather of [4]`"),
    Row("port taken", 3, rank=None, flags=("--master-port", "PORT"), busy=True, told="is in use"),
    Row("unreachable master", 7, rank=None, flags=ELSEWHERE, told="127.0.0.1"),
    Row("Ctrl-C", 130, rank=None, signals=(signal.SIGINT,), told="interrupted"),
    Row("Ctrl-C twice", 130, (DOES_NOT_END, WAITS), rank=None, told="interrupted",
        signals=(signal.SIGINT, signal.SIGINT)),
    Row("SIGTERM", 143, (DOES_NOT_END, WAITS), rank=None, signals=(signal.SIGTERM,),
        told="2 ranks may take 2 s more to end; a second Ctrl-C ends them now"),
    Row("launcher killed", -signal.SIGKILL, rank=None, signals=(signal.SIGKILL,)),
    Row("disk full in runs/", 0, (PRINTS_3_MB,), rank=None, needs="mount",
        told="No space left on device"),
    Row("1 MB a second printed", 4, (PRINTS_AND_RAISES,), told="raised `ValueError: boom`"),
)  # fmt: skip
