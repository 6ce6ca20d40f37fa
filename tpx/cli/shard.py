"""`tpx shard`: writes a checkpoint as one file a rank, which loads in one sequential read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, PlanError
from ..launch.model import fetch
from ..new_folder import check_target, leftovers
from ..plan.manifest import MANIFEST, is_sharded, read_manifest
from ..plan.prepare import prepare
from ..plan.rank_files import OURS, rank_files
from .plan import PLAN, world_for
from .plan_words import plural, size

if TYPE_CHECKING:
    from ..shard import Progress

NEEDED = {"--tp-plan": "PLAN", "--model": "PATH|ID", "--out": "DIR"}


def add_parser(subparsers: Any) -> None:
    said = "write a checkpoint as one file a rank, cut by a plan"
    command = subparsers.add_parser("shard", help=said, description=f"{said}.".capitalize())
    add = command.add_argument
    add("--tp-plan", metavar="PLAN", help=PLAN)
    add("--model", metavar="PATH|ID", help="a folder or a Hugging Face id")
    add("--revision", metavar="NAME", help="of a Hugging Face id")
    add("--world", type=int, metavar="N", help="ranks (default: as many as the plan has)")
    add("--out", metavar="DIR", help="the folder to write; `--model DIR` loads it")
    add("--force", action="store_true", help="replace what `tpx shard` wrote there before")
    add("--verify", metavar="DIR", help="compare a sharded checkpoint's files with their hashes")
    add("--traceback", action="store_true", help="show every frame of an error")


def run(args: argparse.Namespace) -> int:
    """-> 0, or 1 where `--verify` finds a file that is not as it was written."""
    if args.verify is not None:
        return verify(Path(args.verify))
    for flag, metavar in NEEDED.items():
        if getattr(args, flag[2:].replace("-", "_")) is None:
            raise PlanError(f"`tpx shard` needs `{flag}`", f"add `{flag} {metavar}`")
    out = Path(args.out).expanduser()
    prepared = prepare(args.model, args.tp_plan, world_for(args, args.tp_plan), args.revision)
    if prepared.presharded is not None:
        raise prepared.presharded.refuse()
    nbytes = sum(file.nbytes for file in rank_files(prepared))
    check_target(out, nbytes, args.force, OURS)  # before the seconds that torch's import takes
    from ..shard import shard

    left = leftovers(out)
    prepared = fetch(prepared, range(prepared.world), None)
    with bar() as progress:
        written = shard(prepared, out, args.force, progress)
    rate = size(written.nbytes / written.seconds)
    print(
        f"wrote {plural(written.files, 'file')}, {size(written.nbytes)}, to `{args.out}` in "
        f"{written.seconds:.1f} s ({rate}/s)"
    )
    for folder in left:
        print(f"note: `{folder}` is left from a run that was killed; remove it")
    return 0


def verify(folder: Path) -> int:
    if not is_sharded(folder):
        raise CheckpointError(f"there is no `{folder / MANIFEST}`", "give what `tpx shard` wrote")
    from ..shard import damaged

    found = damaged(folder)
    for name in found:
        print(f"`{name}` is not as it was written: its sha256 is another")
    if found:
        return 1
    stored = read_manifest(folder)[0].files.values()
    total = size(sum(file.nbytes for file in stored))
    print(f"{plural(len(stored), 'file')}, {total}: every byte is as it was written")
    return 0


@contextmanager
def bar() -> Iterator[Progress | None]:
    """On a terminal, one that goes away when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn("shard"), BarColumn(bar_width=None), DownloadColumn()
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as drawn:
        task = drawn.add_task("")
        yield lambda done, total: drawn.update(task, completed=done, total=total)
