"""Whether the kernel killed a process of this job because memory ran out, and what a rank held."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .room import control_groups


def count_oom_kills() -> int:
    """In this process's control group, so far; 0 where it is not known."""
    for root, folder, files in control_groups():
        try:
            text = (root / folder / files.kills).read_text()
        except OSError:
            continue
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        if found:
            return int(found[1])
    return 0


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where there is none."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")
