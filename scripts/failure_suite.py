"""Runs each way in which a job can fail under `tpx launch`, and beside it under torchrun: which
rank is named, the exit code, the lines on the console, and how long until every process is gone.

    python scripts/failure_suite.py [--times N] [--only WORDS] [--tpx-only]

A hang ends after HANG seconds: by `--hang-timeout` under tpx, by the collectives' own timeout under
torchrun. A row is left out, with the reason, where the machine does not allow it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from failure_rows import HANG, ROWS, Row

ROOT = Path(__file__).parent.parent
TPX = (sys.executable, "-m", "tpx", "launch", "--device", "cpu")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
MOST_LINES, MOST_SECONDS = 25, 5.0
LIMIT = 60  # seconds for one run
FOREIGN = re.compile(r"(RANK|WORLD_SIZE|LOCAL_\w+|MASTER_\w+|TPX_\w+|TORCHELASTIC_\w+)$")
MEMORY = 1 << 30  # bytes of a cgroup
CGROUP = Path("/sys/fs/cgroup/memory")


class Found(NamedTuple):
    """seconds: from the fault, or from when it can be known, to the last process. left: processes
    that did not end."""

    code: int
    rank: int | None
    lines: int
    seconds: float
    left: int
    text: str

    def wrong(self, row: Row) -> list[str]:
        """What is not as it must be, under tpx."""
        checks = {
            f"exit code {self.code}, not {row.code}": self.code == row.code,
            f"names rank {self.rank}, not {row.rank}": row.rank is None or self.rank == row.rank,
            f"does not say {row.told!r}": row.told in self.text,
            f"{self.lines} lines": self.lines <= MOST_LINES,
            f"{self.seconds:.1f} s": self.seconds <= MOST_SECONDS,
            f"{self.left} processes left": not self.left,
            "a traceback of the launcher": "tpx/launch/" not in self.text,
        }
        return [said for said, holds in checks.items() if not holds]


def run_row(row: Row, under_tpx: bool, folder: Path, model: Path) -> Found:
    """In an empty folder. model: a checkpoint, for the rows that load one."""
    script = folder / "script.py"
    script.write_text(row.text())
    if row.loads:
        shutil.copytree(model, folder / "model")
    with ExitStack() as stack:
        port = stack.enter_context(taken_port(row.busy))
        join = stack.enter_context(cgroup()) if row.needs == "cgroup" else None
        if row.needs == "mount":
            stack.enter_context(small_disk(folder / "runs"))
        words = command(row, under_tpx, port, folder)
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [*words, str(script)], cwd=folder, env=environment(under_tpx), stdout=out,
                stderr=err, preexec_fn=join,
            )  # fmt: skip
            return watch(row, process, folder)


def command(row: Row, under_tpx: bool, port: int, folder: Path) -> list[str]:
    flags = [str(port) if word == "PORT" else word for word in row.flags]
    if not under_tpx:
        logs = ("--log-dir", str(folder / "runs"), "--redirects", "1")
        return [*TORCHRUN, "--nproc-per-node", str(row.ranks), *logs, *flags]
    hang = ("--hang-timeout", str(HANG)) if row.hangs else ()
    return [*TPX, "--nproc", str(row.ranks), *hang, *flags]


def environment(under_tpx: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    collective = LIMIT if under_tpx else HANG
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLLECTIVE_S": str(collective)}


def watch(row: Row, process: subprocess.Popen[bytes], folder: Path) -> Found:
    """Does what the row asks for, waits for the end, and looks at what is left."""
    began, fault = time.time(), folder / "fault"
    if row.signals:
        wait(lambda: fault.exists() or process.poll() is not None)
        for number in row.signals:
            time.sleep(0.5)
            began = time.time()
            process.send_signal(number)
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        code = 124
        process.kill()
        process.wait()
    pids = [int(path.read_text() or 0) for path in folder.glob("pid.*")]
    left = wait(lambda: not alive(pids), 0 if row.code >= 0 and code != 124 else MOST_SECONDS)
    end = time.time()
    for pid in alive(pids):
        os.kill(pid, signal.SIGKILL)
    if fault.exists() and not row.signals:
        began = float(fault.read_text()) + HANG * row.hangs
    text = (folder / "stderr").read_text(errors="replace")
    named = re.search(named_by(code), text)
    rank = int(named[1]) if named else None
    lines = text.count("\n")
    return Found(code, rank, lines, end - began, 0 if left else len(alive(pids)), text)


def named_by(code: int) -> str:
    """The first rank that tpx's error names; torchrun's root cause."""
    return r"(?:error: |Root Cause[^$]*?rank +: )(?:[a-z :]*rank )?(\d+)"


def wait(holds: object, limit: float = LIMIT) -> bool:
    assert callable(holds)
    deadline = time.monotonic() + limit
    while not holds():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def alive(pids: list[int]) -> list[int]:
    """Those that run; a zombie is for its new parent to take."""
    found = []
    for pid in pids:
        path = Path(f"/proc/{pid}/stat")
        if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(pid)
    return found


@contextmanager
def taken_port(busy: bool) -> Iterator[int]:
    """A port of this machine: somebody listens there, or nobody."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if busy:
            held.listen()
        port = held.getsockname()[1]
        if busy:
            yield port
            return
    yield port


@contextmanager
def cgroup() -> Iterator[object]:
    """-> what puts a new process into a cgroup (version 1) of little memory."""
    folder = Path(tempfile.mkdtemp(prefix="tpx-", dir=CGROUP / own_cgroup()))
    (folder / "memory.limit_in_bytes").write_text(str(MEMORY))
    try:
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        wait(lambda: not (folder / "cgroup.procs").read_text(), MOST_SECONDS)
        folder.rmdir()


def own_cgroup() -> str:
    found = re.search(r"^\d+:memory:/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    return found[1] if found else ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def missing(row: Row) -> str | None:
    """Why this machine cannot run the row."""
    if row.needs == "cgroup" and not os.access(CGROUP / own_cgroup() / "cgroup.procs", os.W_OK):
        return "no cgroup of version 1 that can be written to"
    if row.needs == "mount":
        tried = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True).returncode:
            return "no right to mount"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--tpx-only", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_checkpoint

    print(f"{'':28}{'':10}{'rank named':>12}{'code':>12}{'lines':>8}{'seconds':>9}{'left':>6}")
    with tempfile.TemporaryDirectory(prefix="tpx-failures-") as folder:
        model = tiny_checkpoint(Path(folder, "model"))
        for row in ROWS:
            if args.only in row.name:
                show(row, args.times, args.tpx_only, Path(folder), model)


def show(row: Row, times: int, tpx_only: bool, folder: Path, model: Path) -> None:
    reason = missing(row)
    if reason is not None:
        print(f"{row.name:28}left out: {reason}")
        return
    for under_tpx in (True,) if tpx_only else (True, False):
        found = []
        for number in range(times):
            where = folder / f"{row.name}-{under_tpx}-{number}".replace("/", "")
            where.mkdir()
            found.append(run_row(row, under_tpx, where, model))
        right = sum(one.rank == row.rank for one in found)
        named = "-" if row.rank is None else f"{right} of {times}"
        codes = ", ".join(str(code) for code in sorted({one.code for one in found}))
        lines, seconds = max(one.lines for one in found), max(one.seconds for one in found)
        name, launcher = (row.name, "tpx") if under_tpx else ("", "torchrun")
        left = max(one.left for one in found)
        print(f"{name:28}{launcher:10}{named:>12}{codes:>12}{lines:>8}{seconds:>9.1f}{left:>6}",
              flush=True)  # fmt: skip
        wrong = [one for one in found if one.wrong(row)] if under_tpx else []
        for one in wrong:
            print(f"{'':4}! {', '.join(one.wrong(row))}:\n{one.text}")


if __name__ == "__main__":
    main()
