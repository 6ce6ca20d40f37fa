"""Which rank failed first, and the one error that says so. Reads the records that shim.py leaves.

A *victim* is a rank that ended because another one did: its connection closed, or it was told to
stop. A victim is the cause only where there is nothing else.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LaunchError
from .elastic import Failure

VICTIM = re.compile(  # gloo, torch's store, NCCL
    r"closed by peer|Connection reset by peer|Connection refused|Broken pipe|pair closure"
    r"|Timed out waiting|wait timeout|Socket Timeout|recvValue failed|sendBytes failed"
    r"|failed to recv|Did the remote server shutdown|DistNetworkError"
    r"|[Cc]ommunicator was aborted|remote process exit|collective operation timeout"
)
OOM_COUNT = Path("/sys/fs/cgroup/memory.events")
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
    out_of_memory: bool = False,
) -> Ending:
    """failures: as the launcher saw them. full: every frame of the traceback."""
    recorded = {record.rank for record in records}
    silent = [failure for failure in failures if failure.rank not in recorded]
    causes = [record for record in records if not record.is_victim]
    killed = [f for f in silent if f.code < 0 and f.code != -signal.SIGTERM]
    ended = [f for f in silent if f.code > 0]
    if causes:
        return ending_of_record(causes[0], records, nproc, full)
    if killed:
        return ending_of_signal(killed[0], out_of_memory)
    if ended:
        return ending_of_exit(ended[0].rank, ended[0].code)
    if records:
        return ending_of_record(records[0], records, nproc, full)
    return ending_of_signal(silent[0], out_of_memory)


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
    shown = record.full_traceback if full else record.traceback
    hint = None
    if record.is_victim:
        hint = "it waited for another rank; on several machines the cause is on another one"
    elif shown != record.full_traceback:
        hint = "`--traceback` shows every frame"
    error = LaunchError(f"rank {record.rank} raised `{headline(record.message)}`", None)
    tail = f"\n\nhint: {hint}" if hint else ""
    return Ending(4, f"{error.render()}\n\n{shown}{tail}")


def headline(message: str) -> str:
    line = message.strip().partition("\n")[0]
    return line if len(line) <= ONE_LINE else f"{line[:ONE_LINE]} ..."


def ending_of_exit(rank: int, code: int) -> Ending:
    """A script's own exit code is the job's."""
    return Ending(code, LaunchError(f"rank {rank} ended with exit code {code}").render())


def ending_of_signal(failure: Failure, out_of_memory: bool = False) -> Ending:
    if -failure.code == signal.SIGPIPE:
        return Ending(128 + signal.SIGPIPE)
    name = signal.Signals(-failure.code).name
    hint = f"`{name}` came from outside the job"
    if failure.code == -signal.SIGKILL:
        hint = "the kernel kills so when memory runs out: use more ranks, or a smaller model"
        if out_of_memory:
            hint = "this machine ran out of memory: use more ranks, or a smaller model"
    elif -failure.code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE):
        hint = "`PYTHONFAULTHANDLER=1 tpx launch ...` shows where"
    error = LaunchError(f"rank {failure.rank} was killed by `{name}`", hint, exit_code=5)
    return Ending(error.exit_code, error.render())


def count_oom_kills() -> int:
    """Processes of this container that the kernel killed for want of memory; 0 if unknown."""
    try:
        found = re.search(r"^oom_kill (\d+)$", OOM_COUNT.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
