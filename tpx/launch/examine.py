"""Asks the ranks of a job that hangs where they stand, before any of them is ended."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import LaunchError
from .beat import ASK, STACKS
from .hang import Stand, explain, read_stand
from .ranks_here import stat

PATIENCE = 2.0  # seconds for the answers
TICK = 0.05


def examine(
    run_dir: Path, alive: Mapping[int, int], ended: Mapping[int, int | None], seconds: float
) -> LaunchError:
    """alive: the pid of each rank that runs; ended: the exit code, if known, of each that does not.
    The answers stay in <run dir>/hang."""
    beats, folder = run_dir / "beats", run_dir / "hang"
    (beats / ASK).touch()
    for pid in alive.values():
        ask_for_stacks(pid)
    wait_for_answers(beats, alive)
    keep(beats, folder)
    (beats / ASK).unlink(missing_ok=True)
    stands = [look_at(rank, pid, folder) for rank, pid in alive.items()]
    stands += [Stand(rank, gone=said_of(code)) for rank, code in ended.items()]
    return explain(sorted(stands, key=lambda stand: stand.rank), seconds, folder)


def said_of(code: int | None) -> str:
    return "has ended" if code is None else f"has ended with exit code {code}"


def ask_for_stacks(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, STACKS)


def wait_for_answers(beats: Path, ranks: Mapping[int, int]) -> None:
    """Until every rank has written both files, and no stack grows any more; for a limited time."""
    deadline, sizes = time.monotonic() + PATIENCE, [-1]
    while time.monotonic() < deadline:
        before, sizes = sizes, [size(beats / f"{rank}.stacks") for rank in ranks]
        answered = all((beats / f"{rank}.json").exists() for rank in ranks)
        if answered and all(sizes) and sizes == before:
            return
        time.sleep(TICK)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def keep(beats: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in (*beats.glob("*.json"), *beats.glob("*.stacks")):
        path.replace(folder / f"rank{path.name}")


def look_at(rank: int, pid: int, folder: Path) -> Stand:
    seen = stat(pid)
    if seen is not None and seen.state in "Tt":
        return Stand(rank, gone=f"is stopped (`kill -CONT {pid}` lets it go on)")
    return read_stand(rank, folder)
