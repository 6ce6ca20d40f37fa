"""`tpx plan`: what a plan does, from config.json and headers alone. No command of it starts a rank.

Each command's work is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..plan.device import DEVICES
from ..plan.prepare import Prepared, prepare

PLAN = "auto, a plan's name or a YAML file"
DEVICE = f"for --io: {', '.join(DEVICES)} (default: the GPU here, else h100)"
COMMANDS = {
    "check": "prove a plan; prints errors, and else one line",
    "show": "shapes, bytes and collectives of every rank",
    "explain": "all of it, with memory, proofs and pictures",
    "diff": "what moves between two plans",
}
OTHERS = {"auto": "plan_auto", "import-hf": "plan_hf", "export-hf": "plan_hf"}


def add_parser(subparsers: Any) -> None:
    text = "Proves, explains, compares and chooses plans, without starting a rank."
    parser = subparsers.add_parser("plan", description=text)
    commands = parser.add_subparsers(dest="plan_command", required=True, metavar="COMMAND")
    for name, said in COMMANDS.items():
        command = commands.add_parser(name, help=said, description=f"{said}.".capitalize())
        for plan in ("before", "after") if name == "diff" else ("plan",):
            command.add_argument(plan, metavar=plan.upper(), help=PLAN)
        command.add_argument(
            "--model", required=True, metavar="PATH|ID", help="a folder or a Hugging Face id"
        )
        command.add_argument("--revision", metavar="NAME", help="of a Hugging Face id")
        command.add_argument(
            "--world", type=int, metavar="N", help="ranks (default: as many as the plan has)"
        )
        if name != "check":
            command.add_argument("--json", action="store_true", help="print values, not a table")
    _add_explain(commands.choices["explain"])
    for module in dict.fromkeys(OTHERS.values()):
        import_module(f".{module}", __package__).add_parser(commands)


def _add_explain(command: argparse.ArgumentParser) -> None:
    load = command.add_argument_group("What memory is counted for")
    load.add_argument(
        "--context", type=int, metavar="C", help="tokens of a sequence (default: the model's)"
    )
    load.add_argument("--batch", type=int, metavar="B", help="sequences of the job (default: 1)")
    more = command.add_argument_group("More")
    more.add_argument("--html", metavar="FILE", help="write one page with pictures")
    more.add_argument(
        "--simulate", action="store_true", help="compare with a rank's recorded collectives"
    )
    more.add_argument(
        "--io", action="store_true", help="the spans of files that a node's ranks read, and bytes"
    )
    more.add_argument(
        "--rank", type=int, metavar="R", help="the rank to simulate, or whose spans to draw"
    )
    more.add_argument("--device", metavar="NAME", help=DEVICE)
    more.add_argument("--topology", metavar="NxG", help="for --io: nodes x GPUs (default: 8 each)")


def run(args: argparse.Namespace) -> int:
    """-> 0, or 1 where a simulation differs; whatever is wrong is raised."""
    if args.plan_command in OTHERS:
        return int(import_module(f".{OTHERS[args.plan_command]}", __package__).run(args))
    if args.plan_command == "diff":
        from . import plan_diff

        return plan_diff.run(args)
    prepared = prepare(args.model, args.plan, world_for(args, args.plan), args.revision)
    if args.plan_command == "check":
        _print_check(prepared)
        return 0
    return _show(prepared, args) if args.plan_command == "show" else _explain(prepared, args)


def _show(prepared: Prepared, args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..plan.explain import explain
    from .plan_json import as_json
    from .plan_table import show

    explained = explain(prepared)
    if args.json:
        print(json.dumps(as_json(prepared, explained), indent=2))
    else:
        show(prepared, explained, Console(highlight=False, soft_wrap=False))
    return 0


def _explain(prepared: Prepared, args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..plan.explain import explain
    from . import plan_io, plan_simulate, plan_table
    from .plan_json import as_json

    _check_io(args)
    _check_rank(args.rank, prepared.world, args.simulate or args.io)
    explained = explain(prepared, args.context, args.batch)
    if args.html is not None:
        from .plan_html import write_page

        write_page(args.html, prepared, explained)
    found = plan_simulate.simulated(prepared, args.rank or 0) if args.simulate else []
    reads = plan_io.find(prepared, args) if args.io else None
    console = Console(highlight=False, soft_wrap=False)
    if args.json:
        extra: dict[str, Any] = {"simulations": plan_simulate.as_json(found)} if found else {}
        extra |= {"io": plan_io.as_json(reads, args.rank)} if reads else {}
        print(json.dumps(as_json(prepared, explained) | extra, indent=2))
        return int(not all(each.equal for each in found))
    if args.html is None:
        plan_table.explain(prepared, explained, console)
    else:
        print(f"wrote {args.html}")
    plan_simulate.draw(found, console)
    if reads is not None:
        plan_io.draw(reads, args.rank, console)
    return int(not all(each.equal for each in found))


def _check_io(args: argparse.Namespace) -> None:
    for flag, value in (("--device", args.device), ("--topology", args.topology)):
        if value is not None and not args.io:
            raise PlanError(f"`{flag}` is what `--io` reads for", "add `--io`")


def _check_rank(rank: int | None, world: int, wanted: bool) -> None:
    if rank is None:
        return
    if not wanted:
        raise PlanError(
            "`--rank` names the rank to simulate, or whose spans to print",
            "add `--simulate` or `--io`",
        )
    if not 0 <= rank < world:
        ranks = f"0 to {world - 1}" if world > 1 else "0, the only one"
        raise PlanError(f"`--rank` is `{rank}`, and the plan has none such", f"give {ranks}")


def world_for(args: argparse.Namespace, plan: str) -> int:
    """As asked for, else as the checkpoint is sharded, else what the plan's mesh has."""
    if args.world is not None:
        if args.world < 1:
            raise PlanError(f"`--world` is `{args.world}`", "give the number of ranks, 1 or more")
        return int(args.world)
    from ..plan.manifest import world_of

    sharded_for = world_of(Path(args.model).expanduser())
    if sharded_for is not None:
        return sharded_for
    if plan == "auto":
        raise PlanError("`auto` plans for a number of ranks, and none is given", "add `--world 2`")
    from ..config import read_config
    from ..families import family_of
    from ..hub import find_model
    from ..plan.find import read_plan

    family = family_of(read_config(find_model(args.model, args.revision)))
    return read_plan(plan, family.model_type).mesh.world


def _print_check(prepared: Prepared) -> None:
    facts = sum(proof.facts for proof in prepared.proofs)
    print(
        f"`{prepared.plan.path}` holds for {prepared.world} "
        f"rank{'s' * (prepared.world > 1)}: {len(prepared.proofs)} proofs, {facts:,} facts"
    )
