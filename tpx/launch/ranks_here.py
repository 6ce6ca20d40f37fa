"""The processes of this machine's ranks: what each tells of itself, and what it has started."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from .beat import STEP


class Told(NamedTuple):
    """A rank's latest record, see beat.py. counts: of each process group, what the rank entered and
    what has ended. phase, ticks: see beat.Ticks."""

    rank: int
    pid: int
    attempt: int
    modules: int
    counts: dict[str, list[int]]
    phase: str
    ticks: dict[str, int]

    @property
    def waits(self) -> bool:
        """For others. A step on a GPU may call its collectives where nobody sees them."""
        return self.phase == STEP or any(a > b for a, b in self.counts.values())


class Stat(NamedTuple):
    """Of /proc/PID/stat, see proc(5)."""

    state: str
    parent: int
    session: int


def read_told(folder: Path) -> list[Told]:
    """Of all attempts, the earliest first; without those that are not whole."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        rank = path.name.partition("-")[2]
        if rank.isdecimal():
            try:
                found.append(Told(int(rank), **json.loads(path.read_bytes())))
            except (OSError, ValueError):
                continue
    return sorted(found, key=lambda told: (told.attempt, told.rank))


def stat(pid: int) -> Stat | None:
    """None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent, _, session, *_ = text.rpartition(")")[2].split()
    return Stat(state, int(parent), int(session))


def parent_of(pid: int) -> int | None:
    found = stat(pid)
    return found.parent if found else None


def processes_of(sessions: Collection[int]) -> list[int]:
    """Processes that are in one of these sessions, and have not ended."""
    found = []
    for path in Path("/proc").iterdir() if sessions else ():
        seen = stat(int(path.name)) if path.name.isdecimal() else None
        if seen is not None and seen.session in sessions and seen.state != "Z":
            found.append(int(path.name))
    return found
