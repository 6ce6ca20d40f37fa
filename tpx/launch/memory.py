"""Whether the kernel killed a process of this job because memory ran out, and what a rank held."""

from __future__ import annotations

import os
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def count_oom_kills() -> int:
    """In this process's cgroup, version 2 or 1, so far; 0 where it is not known."""
    for path in oom_files():
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0


def oom_files() -> list[Path]:
    """Where the count may be, the likeliest first: a container may see its own cgroup as the root,
    and be told a path from above it."""
    found = []
    for line in SELF.read_text().splitlines() if SELF.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += candidates(CGROUPS, path, "memory.events")
        elif "memory" in controllers.split(","):
            found += candidates(CGROUPS / "memory", path, "memory.oom_control")
    return found


def candidates(root: Path, path: str, file: str) -> list[Path]:
    return [root / path.lstrip("/") / file, root / file]


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where there is none."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")
