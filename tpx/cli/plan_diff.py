"""`tpx plan diff`: what moves from one plan to another, as a table on 80 columns or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..errors import PlanError
from ..families.steps import Collective
from ..plan.diff import Change, Difference, diff
from ..plan.prepare import Prepared, prepare
from .plan import world_for
from .plan_words import named, plural, sent, size


def run(args: argparse.Namespace) -> int:
    """-> 0, whatever differs."""
    sides = [args.before, args.after]
    if args.world is None and sides == ["auto", "auto"]:
        raise PlanError("`auto` plans for a number of ranks, and none is given", "add `--world 2`")
    named_side = next((plan for plan in sides if plan != "auto"), "auto")
    worlds = [world_for(args, named_side if plan == "auto" else plan) for plan in sides]
    before, after = (
        prepare(args.model, plan, world, args.revision)
        for plan, world in zip(sides, worlds, strict=True)
    )
    found = diff(before, after)
    if args.json:
        print(json.dumps(as_json(found, before, after), indent=2))
    else:
        draw(found, before, after, Console(highlight=False, soft_wrap=False))
    return 0


def draw(found: Difference, before: Prepared, after: Prepared, console: Console) -> None:
    for word, side in (("from", found.before), ("to", found.after)):
        console.print(f"{word:<5} [bold]{escape(side.path)}[/bold]", soft_wrap=True)
        console.print(f"      [dim]{plural(side.world, 'rank')}: {side.mesh}[/dim]")
    if found.moved is None:
        worlds = f"{found.before.world} and {found.after.world}"
        console.print(f"\nThe plans are for {worlds} ranks, so only totals are compared.")
    else:
        _draw_moved(found, console)
    _draw_totals(found, before, after, console)
    _draw_changes(found.changes, console)


def _draw_moved(found: Difference, console: Console) -> None:
    assert found.moved is not None
    title = f"{'bytes on the fullest rank':<42}{'before':>11}{'after':>11}{'to read':>12}"
    console.print(f"\n[bold]{title}[/bold]")
    for row in found.moved:
        numbers = f"{size(row.before):>11}{size(row.after):>11}"
        console.print(f"  {escape(row.module):<40}{numbers}{_new(row.most):>12}")
    ranks: dict[int, list[int]] = {}
    for rank, nbytes in enumerate(found.rank_moved):
        ranks.setdefault(nbytes, []).append(rank)
    console.print("\n[bold]a rank must read, and did not hold[/bold]")
    for nbytes, same in ranks.items():
        console.print(f"  {named(same):<40}{size(nbytes):>11}  [dim]{nbytes:,} bytes[/dim]")
    total = sum(found.rank_moved)
    console.print(f"  {'all ranks':<40}{size(total):>11}  [dim]{total:,} bytes[/dim]")


def _new(nbytes: int) -> str:
    return size(nbytes) if nbytes else "-"


def _draw_totals(found: Difference, before: Prepared, after: Prepared, console: Console) -> None:
    console.print(f"\n[bold]{'totals':<42}{'before':>11}{'after':>11}[/bold]")
    for name, field in (("fullest rank", "fullest"), ("all ranks", "held")):
        numbers = (size(getattr(side, field)) for side in (found.before, found.after))
        console.print(f"  {name:<40}{''.join(f'{number:>11}' for number in numbers)}")
    for phase in ("prefill", "decode"):
        numbers = (f"{each:,.0f}" for each in _sent(found, before, after, phase))
        name = f"bytes a token to {phase}"
        console.print(f"  {name:<40}{''.join(f'{number:>11}' for number in numbers)}")


def _sent(found: Difference, before: Prepared, after: Prepared, phase: str) -> tuple[float, float]:
    """What a rank puts into collectives for each token of its own, over all layers."""
    mine = [change for change in found.changes if change.phase == phase]
    sides = ([c.before for c in mine if c.before], [c.after for c in mine if c.after])
    layers = before.spec.num_hidden_layers
    return sent(sides[0], layers), sent(sides[1], layers)


def _draw_changes(changes: tuple[Change, ...], console: Console) -> None:
    phases = {
        phase: [change._replace(phase="") for change in changes if change.phase == phase]
        for phase in ("prefill", "decode")
    }
    if phases["prefill"] == phases["decode"]:
        phases = {"prefill and decode": phases["prefill"]}
    for phase, mine in phases.items():
        differ = [change for change in mine if change.kind != "unchanged"]
        title = "the same" if not differ else f"{len(differ)} of {len(mine)} differ"
        console.print(f"\n[bold]collectives[/bold]  {phase}: {title if mine else 'none'}")
        for change in differ:
            _draw_change(change, console)


def _draw_change(change: Change, console: Console) -> None:
    console.print(f"  {change.kind:<8} [bold]{change.name}[/bold]")
    sides = (("before", change.before), ("after", change.after))
    for (word, step), peers in zip(sides, change.sizes, strict=True):
        if step is not None:
            console.print(f"           [dim]{word:<6}[/dim] {_said(step, peers)}")


def _said(step: Collective, peers: int) -> str:
    each = "row of logits" if step.name == "head" else "token"
    often = "each layer" if step.per_layer else "once"
    nbytes = f"{step.nbytes:,.0f} bytes" + (f" a {each}" if step.per_token else "")
    return f"{step.op} over {step.group} of {peers}, {nbytes}, {often}"


def as_json(found: Difference, before: Prepared, after: Prepared) -> dict[str, Any]:
    """All of `draw`, for programs."""

    def one(step: Collective | None, peers: int) -> dict[str, Any] | None:
        return None if step is None else {**step._asdict(), "bytes": step.nbytes, "peers": peers}

    return {
        "before": found.before._asdict(),
        "after": found.after._asdict(),
        "same_world": found.moved is not None,
        "modules": [row._asdict() for row in found.moved or ()],
        "rank_moved": found.rank_moved,
        "bytes_a_token": {
            phase: _sent(found, before, after, phase) for phase in ("prefill", "decode")
        },
        "collectives": [
            {
                **{"phase": change.phase, "name": change.name, "change": change.kind},
                "before": one(change.before, change.sizes[0]),
                "after": one(change.after, change.sizes[1]),
            }
            for change in found.changes
        ],
    }
