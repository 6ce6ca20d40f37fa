"""Draws an explained plan on 80 columns, or turns it into JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from ..families.steps import Collective
from ..mesh import Mesh
from ..plan.explain import Explained, Kind, Row, Shape
from ..plan.prepare import Prepared

WIDTH = 80
ARROW = "\N{RIGHTWARDS ARROW}"


def draw(prepared: Prepared, explained: Explained, console: Console) -> None:
    plan, world = prepared.plan, prepared.world
    ranks = f"{world} rank{'s' * (world > 1)}"
    console.print(f"[bold]{escape(plan.path)}[/bold]")
    console.print(f"{plan.model} on {ranks}" + (f": {plan.mesh}" if world > 1 else ""))
    for line in prepared.text.splitlines():  # why `auto` chose it
        if plan.path == "auto" and line.startswith("#"):
            console.print(f"[dim]{escape(line[2:])}[/dim]")
    for note in prepared.report:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    console.print()
    if world > 1:
        _draw_mesh(plan.mesh, console)
    _draw_rules(explained.rows, console)
    _draw_collectives(prepared, explained, console)
    _draw_totals(prepared, explained, console)


def _draw_mesh(mesh: Mesh, console: Console) -> None:
    """A row a dp group, a column a tp place; in it the rank and its place on the expert axes."""
    cells = {rank: _cell(mesh, rank) for rank in range(mesh.world)}
    shown = max(1, (WIDTH - 6) // (max(map(len, cells.values())) + 2))
    width = max(map(len, cells.values()))
    heads = [f"tp{tp}".ljust(width) for tp in range(min(shown, mesh.tp))]
    console.print(f"[dim]{'':5} {'  '.join(heads).rstrip()}[/dim]")
    for dp in range(mesh.dp):
        row = [cells[dp * mesh.tp + tp].ljust(width) for tp in range(mesh.tp)]
        for start in range(0, mesh.tp, shown):
            head = f"dp{dp}" if start == 0 else ""
            console.print(f"[dim]{head:<5}[/dim] {'  '.join(row[start : start + shown])}".rstrip())
    console.print()


def _cell(mesh: Mesh, rank: int) -> str:
    place = mesh.coords(rank)
    axes = [f"{a}{getattr(place, a)}" for a in ("edp", "ep", "etp") if getattr(mesh, a) > 1]
    return " ".join([f"rank {rank}", *axes])


def _draw_rules(rows: tuple[Row, ...], console: Console) -> None:
    """A line a rule, with the bytes that rank 0 holds by it, then one a parameter it names."""
    for row in rows:
        line = str(row.rule.line) if row.rule.line else ""
        head = f"[dim]{line:>4}[/dim]  [bold]{escape(row.rule.pattern):<49}[/bold]"
        console.print(f"{head} [cyan]{row.rule.style:<9}[/cyan] {size(row.nbytes):>10}")
        for kind in row.kinds:
            _draw_kind(kind, console)


def _draw_kind(kind: Kind, console: Console) -> None:
    """Its whole shape, rank 0's where that differs, and the first other one."""
    copies = f"{kind.copies} x" if kind.copies > 1 else ""
    left = f"{copies:>4} {short(kind):<20} {kind.dtype:<4}"
    first = f"{ARROW} {times(kind.first)}" if kind.first != kind.whole else ""
    console.print(f"      [dim]{left}[/dim] {times(kind.whole):>{46 - len(left)}} {first}".rstrip())
    if kind.odd:
        rank, shape = kind.odd
        console.print(f"      [dim]{f'rank {rank}':>47}[/dim] {ARROW} {times(shape)}")


def short(kind: Kind) -> str:
    """The last name of a parameter, with its module's where that says nothing."""
    *_, owner, last = ["", *kind.name.split(".")]
    if last not in ("weight", "bias"):
        return last
    return f"{owner}.{last}" if len(owner) < 14 else owner


def times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def size(nbytes: float) -> str:
    """Decimal units, as disks and cards are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def _draw_collectives(prepared: Prepared, explained: Explained, console: Console) -> None:
    phases = {"prefill": explained.prefill, "decode": explained.decode}
    if explained.prefill == explained.decode:
        phases = {"prefill and decode": explained.prefill}
    for phase, steps in phases.items():
        word = getattr(explained.dispatch, phase.partition(" ")[0])
        console.print(f"\n[bold]collectives[/bold]  {phase}, dispatch {word}")
        if not steps:
            console.print("      [dim]none[/dim]")
            continue
        title = f"{'name':<18} {'op':<14} {'over':<12} {'bytes a token':>13}"
        console.print(f"      [dim]{title}[/dim]")
        for step in steps:
            console.print(f"      {_step(prepared, step)}")


def _step(prepared: Prepared, step: Collective) -> str:
    often = f"{prepared.spec.num_hidden_layers} layers" if step.per_layer else "once"
    if step.name == "head":
        often = "a logits row"
    over = f"{step.group} of {prepared.plan.mesh.size(step.group)}"
    nbytes = f"{step.nbytes:,.0f}" if step.per_token else f"{step.nbytes:,.0f} in all"
    return f"{step.name:<18} {step.op:<14} {over:<12} {nbytes:>13}  [dim]{often}[/dim]"


def _draw_totals(prepared: Prepared, explained: Explained, console: Console) -> None:
    console.print("\n[bold]a rank reads and holds[/bold]")
    whole = explained.checkpoint_bytes
    for ranks, nbytes in _alike(explained.rank_bytes):
        share = f"{nbytes:,} bytes, {100 * nbytes / whole:.1f}% of {size(whole)}"
        console.print(f"      {ranks:<14} {size(nbytes):>10}  [dim]{share}[/dim]")
    positions = prepared.spec.max_position_embeddings
    cache = f"rank 0, one sequence of {positions:,} tokens"
    console.print(f"      {'KV cache':<14} {size(explained.kv_bytes):>10}  [dim]{cache}[/dim]")


def _alike(rank_bytes: tuple[int, ...]) -> list[tuple[str, int]]:
    """Neighbouring ranks with as many bytes in one: (`ranks 0-1`, bytes)."""
    runs: list[list[int]] = []
    for rank, nbytes in enumerate(rank_bytes):
        if runs and rank_bytes[runs[-1][0]] == nbytes:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return [
        (f"ranks {run[0]}-{run[-1]}" if len(run) > 1 else f"rank {run[0]}", rank_bytes[run[0]])
        for run in runs
    ]


def as_json(prepared: Prepared, explained: Explained) -> dict[str, Any]:
    """All of `draw`, for programs."""
    mesh = prepared.plan.mesh
    return {
        "plan": prepared.plan.path,
        "model": prepared.plan.model,
        "world": prepared.world,
        "digest": prepared.digest,
        "mesh": {axis: getattr(mesh, axis) for axis in ("dp", "tp", "edp", "ep", "etp")},
        "dispatch": explained.dispatch._asdict(),
        "rules": [
            {
                **{"pattern": row.rule.pattern, "style": row.rule.style, "line": row.rule.line},
                "bytes": row.nbytes,
                "parameters": [kind._asdict() for kind in row.kinds],
            }
            for row in explained.rows
        ],
        "collectives": {
            phase: [{**step._asdict(), "bytes": step.nbytes} for step in steps]
            for phase, steps in (("prefill", explained.prefill), ("decode", explained.decode))
        },
        "rank_bytes": explained.rank_bytes,
        "checkpoint_bytes": explained.checkpoint_bytes,
        "kv_bytes": explained.kv_bytes,
        "notes": prepared.report,
    }
