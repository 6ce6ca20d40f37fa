"""What this machine has room for: memory that a job may take, shared memory, limits of processes.

Memory is what the machine has, and what each control group above this process allows, of either
version of cgroups: containers use both.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")


class Room(NamedTuple):
    """Bytes that can still be taken, and what sets them: a phrase."""

    free: int
    of: str


def memory_room() -> Room | None:
    """The least of what the machine has and its control groups allow; None: not known."""
    found = [*machine_room(), *group_rooms()]
    return min(found, key=lambda room: room.free) if found else None


def machine_room() -> Iterator[Room]:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1:]}
    if "MemAvailable" in kilobytes:
        yield Room(kilobytes["MemAvailable"] * 1024, "this machine")


def group_rooms() -> Iterator[Room]:
    """Of each control group that this process is in and that has a limit."""
    for root, folder, files in control_groups():
        yield from group_room(root / folder, f"/{folder}", files)


class Files(NamedTuple):
    """Of a control group, by their names in one version."""

    limit: str
    usage: str
    kills: str  # has a line `oom_kill N`
    cache: tuple[str, str]  # lines of memory.stat: what the kernel drops before it kills


V2 = Files("memory.max", "memory.current", "memory.events", ("inactive_file", "active_file"))
V1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control",
           ("total_inactive_file", "total_active_file"))  # fmt: skip


def control_groups() -> Iterator[tuple[Path, str, Files]]:
    """Where a control group of this process may be, the innermost first: the mount, and the folder
    in it. The path may be the host's, and the mount the container's: then the root itself counts.
    """
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, files = [CGROUPS, CGROUPS / "unified"], V2
        elif "memory" in controllers.split(","):
            roots, files = [CGROUPS / "memory"], V1
        else:
            continue
        for root in roots:
            for folder in dict.fromkeys(above(path)):
                yield root, folder, files


def above(path: str) -> list[str]:
    """`a/b`, `a` and ``, of `/a/b`."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return ["/".join(parts[:end]) for end in range(len(parts), -1, -1)]


def group_room(folder: Path, name: str, files: Files) -> Iterator[Room]:
    try:
        limit, usage = ((folder / name).read_text().strip() for name in files[:2])
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return
    if limit == "max" or int(limit) >= 2**62:  # v1 says 2**63 less a page where there is none
        return
    counted = dict(line.split() for line in stat.splitlines())
    cache = sum(int(counted.get(key, 0)) for key in files.cache)
    free = max(0, int(limit) - max(0, int(usage) - cache))
    yield Room(free, f"control group `{name}` with its limit of {int(limit):,} bytes")


def shared_memory() -> int | None:
    """Free bytes of /dev/shm; None where it is missing."""
    try:
        found = os.statvfs(SHM)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def open_files() -> int | None:
    """How many a process may have open; None: any number."""
    return soft_limit(resource.RLIMIT_NOFILE)


def locked_memory() -> int | None:
    """Bytes that a process may lock in memory; None: any number."""
    return soft_limit(resource.RLIMIT_MEMLOCK)


def soft_limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft
