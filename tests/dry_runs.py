"""What `tpx launch --dry-run` prints, without what differs between two runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from guards import ROOT

from tpx.cli.main import main
from tpx.version import __version__


def dry_run(capsys, *words: object) -> tuple[int, str]:
    """`tpx launch --dry-run WORDS...`: the exit code, and the text in a stable form."""
    code = main(["launch", "--dry-run", *map(str, words)])
    return code, stable(capsys.readouterr().out)


def stable(text: str) -> str:
    """Paths, the version, and the time of day in words; the rest as it is."""
    for found, word in (
        (sys.executable, "python"),
        (str(ROOT / "tpx"), "tpx"),
        (str(Path.cwd()), "."),
        (f"tpx {__version__}", "tpx VERSION"),
    ):
        text = text.replace(found, word)
    return re.sub(r"runs/\d{8}-\d{6}-[0-9a-f]{4}", "runs/RUN", text)
