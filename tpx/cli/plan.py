"""`tpx plan check` and `tpx plan show`: what a plan does, from config.json and headers alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..hub import find_model
from ..plan.find import read_plan
from ..plan.prepare import Prepared, prepare

if TYPE_CHECKING:
    from rich.console import Console


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("plan", help="check a plan, or show what each rank holds")
    commands = parser.add_subparsers(dest="plan_command", required=True, metavar="check|show")
    check = commands.add_parser("check", help="prove a plan for a model and a number of ranks")
    show = commands.add_parser("show", help="show shapes, bytes and collectives of every rank")
    for command in (check, show):
        command.add_argument("plan", metavar="PLAN", help="auto, a plan's name or a YAML file")
        command.add_argument("--model", required=True, help="a folder or a Hugging Face id")
        command.add_argument("--revision", help="of a Hugging Face id")
        command.add_argument("--world", type=int, help="ranks (default: as many as the plan needs)")
    show.add_argument("--json", action="store_true", help="print values, not a table")


def run(args: argparse.Namespace) -> int:
    """-> 0; whatever is wrong is raised."""
    from rich.console import Console

    prepared = prepare(args.model, args.plan, _world(args), args.revision)
    console = Console(highlight=False, soft_wrap=False)
    if args.plan_command == "check":
        _print_check(prepared, console)
        return 0
    from ..plan.explain import explain
    from .plan_table import as_json, draw

    if args.json:
        print(json.dumps(as_json(prepared, explain(prepared)), indent=2))
    else:
        draw(prepared, explain(prepared), console)
    return 0


def _world(args: argparse.Namespace) -> int:
    """As asked for, else what the plan's mesh has."""
    if args.world is not None:
        if args.world < 1:
            raise PlanError(f"`--world` is `{args.world}`", "give the number of ranks, 1 or more")
        return int(args.world)
    if args.plan == "auto":
        raise PlanError("`auto` plans for a number of ranks, and none is given", "add `--world 2`")
    from ..config import read_config
    from ..families import family_of

    family = family_of(read_config(find_model(args.model, args.revision)))
    return read_plan(args.plan, family.model_type).mesh.world


def _print_check(prepared: Prepared, console: Console) -> None:
    for proof in prepared.proofs:
        count = f"  [dim]{proof.facts:,}[/dim]" if proof.facts > 1 else ""
        console.print(f"[green]✓[/green] {proof.text}{count}")
    facts = sum(proof.facts for proof in prepared.proofs)
    console.print(
        f"\n`{prepared.plan.path}` holds for {prepared.world} "
        f"rank{'s' * (prepared.world > 1)}: {len(prepared.proofs)} proofs, {facts:,} facts"
    )
