"""Which rank failed first, and the one error that says so. Reads the records that shim.py leaves.

A *victim* is a rank that ended because another one did: its connection closed, or it was told to
stop. A victim is the cause only where there is nothing else.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import LaunchError
from .elastic import Failure

VICTIM = re.compile(  # gloo, torch's store, NCCL
    r"closed by peer|Connection reset by peer|Connection refused|Broken pipe|pair closure"
    r"|Timed out waiting|wait timeout|Socket Timeout|recvValue failed|sendBytes failed"
    r"|failed to recv|Did the remote server shutdown|DistNetworkError"
    r"|[Cc]ommunicator was aborted|remote process exit|collective operation timeout"
)
NO_MEMORY = re.compile(r"^MemoryError|can't allocate memory|OutOfMemoryError|CUDA out of memory")
FEWER = "use more ranks, or a smaller model"
ONE_LINE = 300  # characters of a message shown in the headline


class Record(NamedTuple):
    """What a rank wrote. kind: "raised", "tpx" (a TpxError), "exit" (sys.exit) or "pipe"."""

    rank: int
    time_ns: int
    kind: str
    message: str = ""
    hint: str | None = None
    exit_code: int = 1
    code: str | None = None
    chain: tuple[str, ...] = ()
    traceback: str = ""
    full_traceback: str = ""

    @property
    def is_victim(self) -> bool:
        return self.kind == "raised" and any(VICTIM.search(text) for text in self.chain)


class Memory(NamedTuple):
    """held: bytes of each rank shortly before its end. ran_out: whether the kernel killed a process
    because there was no more."""

    held: Mapping[int, int] = MappingProxyType({})
    ran_out: bool = False


UNKNOWN = Memory()


class Ending(NamedTuple):
    """How a job ended: its exit code, and the text for stderr."""

    exit_code: int
    text: str = ""


def read_records(run_dir: Path) -> list[Record]:
    """Those of the last attempt, the earliest first."""
    found = [(int(p.stem.split("-")[0]), p) for p in (run_dir / "errors").glob("*-*.json")]
    last = max((attempt for attempt, _ in found), default=0)
    records = [read_record(path) for attempt, path in found if attempt == last]
    return sorted(records, key=lambda record: record.time_ns)


def read_record(path: Path) -> Record:
    data: dict[str, Any] = json.loads(path.read_text())
    return Record(**{key: value for key, value in data.items() if key in Record._fields})


def ending(
    failures: Sequence[Failure],
    records: Sequence[Record],
    nproc: int,
    full: bool = False,
    memory: Memory = UNKNOWN,
) -> Ending:
    """failures: as the launcher saw them. full: every frame of every rank's traceback."""
    recorded = {record.rank for record in records}
    silent = [failure for failure in failures if failure.rank not in recorded]
    causes = [record for record in records if not record.is_victim]
    own = [failure for failure in silent if failure.code != -signal.SIGTERM]
    first = min(own, key=Failure.order, default=None)
    if causes and (first is None or causes[0].time_ns < first.order()[0]):
        return ending_of_record(causes[0], records, nproc, full)
    if first is not None:
        return ending_of_failure(first, memory)
    if records:
        return ending_of_record(records[0], records, nproc, full)
    return ending_of_failure(min(silent, key=Failure.order), memory)


def ending_of_failure(failure: Failure, memory: Memory) -> Ending:
    if failure.code > 0:
        return ending_of_exit(failure.rank, failure.code)
    return ending_of_signal(failure, memory)


def ending_of_record(
    record: Record, records: Sequence[Record], nproc: int, full: bool = False
) -> Ending:
    if record.kind == "pipe":
        return Ending(128 + signal.SIGPIPE)
    if record.kind == "exit":
        return ending_of_exit(record.rank, record.exit_code)
    if record.kind == "tpx":
        alike = sum(other[2:5] == record[2:5] for other in records)
        message = record.message if alike >= nproc else f"rank {record.rank}: {record.message}"
        error = LaunchError(message, record.hint, code=record.code, exit_code=record.exit_code)
        text = error.render()
        return Ending(record.exit_code, f"{record.full_traceback}\n\n{text}" if full else text)
    error = LaunchError(f"rank {record.rank} raised `{headline(record.message)}`", None)
    parts = [error.render(), all_tracebacks(records) if full else record.traceback]
    parts += [text for text in (others(record, records, nproc), hint_for(record, full)) if text]
    return Ending(4, "\n\n".join(parts))


def all_tracebacks(records: Sequence[Record]) -> str:
    raised = [record for record in records if record.kind == "raised"]
    if len(raised) == 1:
        return raised[0].full_traceback
    return "\n\n".join(f"rank {record.rank}:\n{record.full_traceback}" for record in raised)


def others(record: Record, records: Sequence[Record], nproc: int) -> str:
    """How many other ranks of this machine raised the same, and how many only ended with it."""
    same = sum(headline(other.message) == headline(record.message) for other in records) - 1
    rest = nproc - 1 - same
    said = []
    if same:
        said.append(f"{same} other rank{'s' * (same > 1)} raised the same")
    if rest > 0 and same:
        said.append(f"{rest} more ended with {'them' if same else 'it'}")
    elif rest > 0:
        said.append(f"{rest} other rank{'s' * (rest > 1)} ended with it")
    return ", ".join(said)


def hint_for(record: Record, full: bool) -> str:
    if record.is_victim:
        hint = "it waited for another rank; on several machines the cause is on another one"
    elif NO_MEMORY.search(record.message):
        hint = f"rank {record.rank} ran out of memory: {FEWER}"
    elif not full and record.traceback != record.full_traceback:
        hint = "`--traceback` shows every frame"
    else:
        return ""
    return f"hint: {hint}"


def headline(message: str) -> str:
    line = message.strip().partition("\n")[0]
    return line if len(line) <= ONE_LINE else f"{line[:ONE_LINE]} ..."


def ending_of_exit(rank: int, code: int) -> Ending:
    """A script's own exit code is the job's."""
    return Ending(code, LaunchError(f"rank {rank} ended with exit code {code}").render())


def ending_of_signal(failure: Failure, memory: Memory) -> Ending:
    if -failure.code == signal.SIGPIPE:
        return Ending(128 + signal.SIGPIPE)
    name = signal.Signals(-failure.code).name
    hint = f"`{name}` came from outside the job"
    if failure.code == -signal.SIGKILL:
        held = memory.held.get(failure.rank, 0)
        told = f" with {held / 1e9:.1f} GB in use by this rank" if held else ""
        hint = f"the kernel kills so when memory runs out: {FEWER}"
        if memory.ran_out:
            hint = f"this machine, or its container, ran out of memory{told}: {FEWER}"
    elif -failure.code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE):
        hint = "`PYTHONFAULTHANDLER=1 tpx launch ...` shows where"
    error = LaunchError(f"rank {failure.rank} was killed by `{name}`", hint, exit_code=5)
    return Ending(error.exit_code, error.render())
