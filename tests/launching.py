"""Runs `python -m tpx`, and writes the scripts that it shall run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TPX = (sys.executable, "-m", "tpx")
FOREIGN_VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TPX_MODEL TPX_TP_PLAN "
    "TPX_RUN_DIR TPX_KERNELS PYTHONUNBUFFERED"
).split()


def environment(**changes: str) -> dict[str, str]:
    """One thread a rank, no GPU, nothing of another launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
    kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return kept | changes


def start(*words: object, cwd: Path, **settings: Any) -> subprocess.Popen[str]:
    """`tpx WORDS...`, still running."""
    settings.setdefault("env", environment())
    return subprocess.Popen(
        [*TPX, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def tpx(*words: object, cwd: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`tpx WORDS...`, run to its end."""
    return finish(start(*words, cwd=cwd, **settings))


def write_script(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text).lstrip())
    return path
