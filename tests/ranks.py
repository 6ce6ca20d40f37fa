"""Real ranks for tests: `ranks(4).run(fn, *args)` calls fn in 4 processes and returns 4 values.

Import it as `from ranks import ranks`. fn is a top-level function; in each rank the default gloo
group is up and RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set, as under torchrun. The
module that defines fn is imported in every rank, so keep slow imports out of it (transformers; the
first torch.testing.assert_close takes a second, torch.allclose none).
Processes are kept for the whole run; after a failure the next call gets fresh ones.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

GROUP_TIMEOUT = timedelta(seconds=60)
GRACE = 5.0  # seconds that the other ranks have to end once one has failed


class Output(NamedTuple):
    """What one rank returned, and wrote meanwhile (file descriptors 1 and 2)."""

    value: Any
    stdout: str
    stderr: str


class Answer(NamedTuple):
    ok: bool
    value: Any  # of fn, or the traceback


class Member(NamedTuple):
    process: Any
    connection: connection.Connection
    stdout: Path
    stderr: Path


@functools.cache
def ranks(world: int) -> Ranks:
    """The pool of this size, the same one for the whole run."""
    pool = Ranks(world)
    atexit.register(pool.close)
    return pool


class Ranks:
    """`world` processes that wait for functions to call; started when first needed."""

    def __init__(self, world: int):
        self.world = world
        self._members: list[Member] = []
        self._folder: Path | None = None

    def run(self, fn: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Any]:
        """Calls fn(*args) in every rank: the values, by rank. Raises one AssertionError that shows
        every rank's traceback if any rank raised, died, or took longer than `limit` seconds."""
        return [output.value for output in self.capture(fn, *args, limit=limit)]

    def capture(self, fn: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Output]:
        """As `run`, with what each rank wrote."""
        if not self._members or not all(m.process.is_alive() for m in self._members):
            self.close()
            self._start()
        order, answers = self._call(pickle.dumps((fn, args)), limit)
        if all(rank in answers and answers[rank].ok for rank in range(self.world)):
            return [Output(answers[r].value, *self._written(r)) for r in range(self.world)]
        report = self._report(fn, order, answers, limit)
        self.close()
        raise AssertionError(report)

    def close(self) -> None:
        """Ends the processes; the next call starts fresh ones."""
        for member in self._members:
            member.process.kill()
            member.process.join()
            member.process.close()
            member.connection.close()
        self._members = []
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "pytest"])
        self._folder = Path(tempfile.mkdtemp(prefix="tpx-ranks-"))
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            files = self._folder / f"{rank}.out", self._folder / f"{rank}.err"
            arguments = (rank, self.world, self._folder, theirs, *files)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._members.append(Member(process, ours, *files))

    def _call(self, job: bytes, limit: float) -> tuple[list[int], dict[int, Answer]]:
        """Answers by rank, and the ranks that failed, in time's order; silent ranks are missing."""
        for member in self._members:
            try:
                member.connection.send_bytes(job)
            except BrokenPipeError:
                pass  # it died since the last call; reading says so below
        waiting = {member.connection: rank for rank, member in enumerate(self._members)}
        answers: dict[int, Answer] = {}
        failed: list[int] = []
        deadline = time.monotonic() + limit
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for one in ready:
                rank = waiting.pop(one)
                answers[rank] = self._receive(rank)
                if not answers[rank].ok:
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + GRACE)
        return failed, answers

    def _receive(self, rank: int) -> Answer:
        member = self._members[rank]
        try:
            return Answer(*pickle.loads(member.connection.recv_bytes()))
        except (EOFError, ConnectionResetError):
            member.process.join()
            return Answer(False, f"died with exit code {member.process.exitcode}\n")

    def _written(self, rank: int) -> tuple[str, str]:
        member = self._members[rank]
        return (
            member.stdout.read_text(errors="replace"),
            member.stderr.read_text(errors="replace"),
        )

    def _report(
        self, fn: Callable[..., Any], order: list[int], answers: dict[int, Answer], limit: float
    ) -> str:
        silent = [rank for rank in range(self.world) if rank not in answers]
        for rank in silent:  # faulthandler writes where it stands, and it ends
            os.kill(self._members[rank].process.pid, signal.SIGABRT)
            self._members[rank].process.join(GRACE)
        first = f"rank {order[0]} failed first" if order else f"no end after {limit} s"
        lines = [f"{fn.__qualname__} on {self.world} ranks: {first}"]
        for rank in [*order, *silent]:
            lines += [f"--- rank {rank}", answers[rank].value if rank in answers else "no answer\n"]
            lines += [text for text in self._written(rank) if text]
        good = [rank for rank in range(self.world) if rank in answers and answers[rank].ok]
        return "\n".join([*lines, f"--- ranks that returned: {good}"])


def _serve(
    rank: int, world: int, folder: Path, pipe: connection.Connection, stdout: Path, stderr: Path
) -> None:
    """A rank's life: join the group, answer jobs until the pool closes; end at the first failure,
    so that ranks that wait for this one in a collective fail at once too."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(file=2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    warnings.simplefilter("error")  # as in the tests themselves
    environment = dict(os.environ)
    ok = True
    while ok:
        try:
            job = pipe.recv_bytes()
        except EOFError:  # the pool, or the process that made it, has gone
            break
        os.environ.clear()
        os.environ.update(environment)
        ok, answer = _answer(job, rank, world, folder)
        pipe.send_bytes(answer)
    os._exit(0)  # no destructor may wait for ranks that are gone


def _answer(job: bytes, rank: int, world: int, folder: Path) -> tuple[bool, bytes]:
    """Whether the job's function returned, and the pickled Answer."""
    import sys

    import torch
    from torch import distributed

    for descriptor in (1, 2):
        os.ftruncate(descriptor, 0)
    try:
        if not distributed.is_initialized():
            torch.set_num_threads(1)
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world,
                timeout=GROUP_TIMEOUT,
            )
        torch.manual_seed(0)
        fn, args = pickle.loads(job)
        value = fn(*args)
        assert distributed.is_initialized(), "the function ended the default process group"
        return True, pickle.dumps((True, value))
    except BaseException:  # whatever it was, SystemExit too, the test must see it
        return False, pickle.dumps((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
