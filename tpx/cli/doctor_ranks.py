"""`tpx doctor --ranks N`: starts ranks that send each other what they can, for a few seconds."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..launch.hardware import Hardware, product_here
from ..launch.options import Options
from .plan_words import size

NAMES = {"all_reduce": "all-reduce", "all_to_all": "all-to-all"}
WIDTH = 80
SENT = {"all_reduce": 2.0, "all_to_all": 1.0}  # times (n-1)/n of what a rank puts in


def test_ranks(ranks: int, device: str | None, say: Callable[[str], object]) -> tuple[int, str]:
    """-> the exit code, and a fault, if any."""
    from ..launch.preflight import preflight
    from ..launch.supervise import supervise

    with tempfile.TemporaryDirectory(prefix="tpx-doctor-") as folder:
        file = Path(folder, "found.json")
        options = Options(
            nproc=str(ranks),
            device=device,
            run_dir=str(Path(folder, "run")),
            target="tpx.selftest",
            module=True,
            args=(str(file),),
        )
        job = preflight(options)
        ending = supervise(job, options)
        if ending.exit_code:
            print(ending.text, file=sys.stderr)
            return ending.exit_code, ""
        found = json.loads(file.read_text())
    draw(found, Hardware(job.device, ranks, (1, 1)), say)
    if found["wrong"]:
        names = " and ".join(NAMES[op] for op in found["wrong"])
        return 1, f"{names} between {ranks} ranks gives wrong numbers"
    return 0, ""


def draw(found: dict[str, Any], hardware: Hardware, say: Callable[[str], object]) -> None:
    product, ranks = product_here(hardware.device), hardware.nproc
    say(
        f"self-test of {ranks} ranks on {product.name} over {product.backend}, GB/s that each sends"
    )
    say(f"{'put in':>12}" + "".join(f"{name:>12}" for name in NAMES.values()))
    rows: dict[int, dict[str, float]] = {}
    for op, nbytes, seconds in found["points"]:
        sent = SENT[op] * (ranks - 1) / ranks * nbytes
        rows.setdefault(nbytes, {})[op] = sent / seconds / 1e9
    for nbytes, speeds in rows.items():
        say(f"{size(nbytes):>12}" + "".join(f"{speeds[op]:>12.2f}" for op in NAMES))
    stated, *more = wrap(product.intra.source, WIDTH - 26)
    say(f"{'stated':>12}{product.intra.value / 1e9:>12.2f}  {stated}")
    for line in more:
        say(f"{'':26}{line}")
