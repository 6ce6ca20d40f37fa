"""`tpx bench links`: measures collectives on the ranks at hand, and keeps the table for `auto`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..launch.links_file import links_path
from ..launch.options import Options, nproc, words
from ..plan.links import Table, read_table
from ..plan.load import read_size
from .plan_words import size

OPS = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "red.-scatter",
       "all_to_all": "all-to-all", "all_to_all_uneven": "uneven a2a"}  # fmt: skip


def add_parser(commands: Any) -> None:
    said = "collectives of every group size, 1 KB to 64 MB, for `tpx plan auto`"
    links = commands.add_parser("links", help=said, description=f"Measures {said}.")
    links.add_argument(
        "--nproc", default="auto", metavar="N|auto", help="ranks: one a GPU, or two on CPU"
    )
    links.add_argument("--device", metavar="cpu|cuda", help="default: cuda where a GPU is visible")
    links.add_argument(
        "--sizes", metavar="A,B,...", help="what a rank puts in (default: 1KiB,4KiB,...,64MiB)"
    )
    links.add_argument(
        "--out", metavar="FILE", help="where the table is kept (default: where `auto` looks)"
    )


def run(args: argparse.Namespace) -> int:
    """-> the ranks' exit code."""
    from ..launch.preflight import preflight
    from ..launch.supervise import supervise

    sizes = read_sizes(args.sizes) if args.sizes else []
    with tempfile.TemporaryDirectory(prefix="tpx-bench-") as folder:
        file = Path(folder, "links.json")
        told = (str(file), ",".join(map(str, sizes))) if sizes else (str(file),)
        options = Options(
            nproc=nproc("--nproc", args.nproc),
            device=words("cpu", "cuda")("--device", args.device) if args.device else None,
            run_dir=str(Path(folder, "run")),
            target="tpx.bench.links",
            module=True,
            args=told,
        )
        job = preflight(options)
        if job.nproc == 1:
            raise PlanError("links are measured between ranks, and there is one", "use `--nproc 2`")
        ending = supervise(job, options)
        if ending.exit_code:
            print(ending.text, file=sys.stderr)
            return ending.exit_code
        table = read_table(file)
        out = Path(args.out) if args.out else links_path(table.key.device, table.key.topology)
        keep(file, out)
    draw(table, print)
    print(f"\nwrote {out}")
    return 0


def read_sizes(text: str) -> list[int]:
    """From `1KiB,64KiB`. Raises PlanError."""
    words = text.split(",")
    found = [size for word in words if (size := read_size(word)) is not None]
    if len(found) < len(words) or len({*words}) < len(words):
        raise PlanError(
            f"`--sizes {text}` cannot be read", "write different sizes such as `1KiB,64KiB,4MiB`"
        )
    return sorted(found)


def keep(file: Path, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out)
    except OSError as error:
        raise PlanError(
            f"`{out}` cannot be written ({error.strerror})", "give another file: `--out FILE`"
        ) from None


def draw(table: Table, say: Callable[[str], object]) -> None:
    """A block a kind of group: a row a size, a column an op, in microseconds."""
    key = table.key
    versions = ", ".join(f"{name} {version}" for name, version in key.versions.items())
    say(f"{key.device}, {key.topology} (nodes x GPUs), {versions}; microseconds")
    for ranks, per_node in dict.fromkeys((n, k) for _, n, k in table.curves):
        where = "of one node" if per_node == ranks else f"at least {per_node} on a node"
        say(f"\ngroups of {ranks} ranks {where}")
        curves = [table.curves[op, ranks, per_node] for op in OPS]
        say(f"{'put in':>10}" + "".join(f"{name:>14}" for name in OPS.values()))
        for row, nbytes in enumerate(curves[0].nbytes):
            times = "".join(f"{curve.times[row] * 1e6:>14,.1f}" for curve in curves)
            say(f"{size(nbytes):>10}{times}")
        speeds = [f"{1e-9 / curve.beta:.3g}" if curve.beta else "-" for curve in curves]
        say(f"{'GB/s':>10}" + "".join(f"{speed:>14}" for speed in speeds))
        say(f"{'band':>10}" + "".join(f"{100 * curve.residual:>13.0f}%" for curve in curves))
