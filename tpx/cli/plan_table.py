"""Draws an explained plan on 80 columns: `tpx plan show`, and all of it for `tpx plan explain`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..families.steps import Collective
from ..mesh import Mesh
from ..plan.explain import Alike, Explained, Kind, Memory, Row
from ..plan.prepare import Prepared
from .plan_words import (
    how_often,
    meeting,
    named,
    over,
    per_token,
    place,
    plural,
    sent,
    short,
    size,
    times,
)

WIDTH = 80
ARROW = "\N{RIGHTWARDS ARROW}"
DOTS = "\N{HORIZONTAL ELLIPSIS}"
MOST_RANKS = 64  # drawn one by one
MOST_WHOLE = 5  # replicated modules listed
MEMORY = {
    "weights": ("weights", "exact"),
    "kv_cache": ("KV cache", "exact"),
    "pages": ("page rounding", "exact"),
    "logits": ("logits", "exact"),
    "activations": ("activations", "estimated"),
    "total": ("total", "estimated"),
}


def show(prepared: Prepared, explained: Explained, console: Console) -> None:
    _draw_head(prepared, console)
    for row in explained.rows:
        _draw_rule(row, console)
    _draw_collectives(prepared, explained, console)
    _draw_reads(explained, console)
    cache = f"rank 0, {plural(explained.load.sequences(prepared.plan.mesh), 'sequence')} of "
    cache += plural(explained.load.context, "token")
    kv_cache = size(explained.alike[0].memory.kv_cache)
    console.print(f"      {'KV cache':<14} {kv_cache:>10}  [dim]{cache}[/dim]")


def explain(prepared: Prepared, explained: Explained, console: Console) -> None:
    _draw_head(prepared, console)
    for row in explained.rows:
        _draw_rule(row, console)
        _draw_meeting(row, prepared, explained, console)
    _draw_collectives(prepared, explained, console)
    _draw_memory(prepared, explained, console)
    _draw_reads(explained, console)
    if prepared.world > 1:
        _draw_replicated(explained, console)
    _draw_proofs(prepared, console)


def _draw_head(prepared: Prepared, console: Console) -> None:
    plan, world = prepared.plan, prepared.world
    console.print(f"[bold]{escape(plan.path)}[/bold]", soft_wrap=True)
    mesh = f": {plan.mesh}" if world > 1 else ""
    console.print(f"{plan.model} on {plural(world, 'rank')}{mesh}")
    for line in prepared.text.splitlines():  # why `auto` chose it
        if plan.path == "auto" and line.startswith("#"):
            console.print(f"[dim]{escape(line[2:])}[/dim]")
    for note in prepared.report:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    console.print()
    if world > 1:
        _draw_mesh(plan.mesh, console)


def _draw_mesh(mesh: Mesh, console: Console) -> None:
    """A row a dp group, a column a tp place; in it the rank and its place on the expert axes."""
    last = f"rank {mesh.world - 1} {place(mesh, mesh.coords(mesh.world - 1))}".rstrip()
    width = len(last)
    shown = max(1, (WIDTH - 6) // (width + 2))
    few = mesh.world <= MOST_RANKS
    columns, rows = list(range(mesh.tp)), list(range(mesh.dp))
    if not few and mesh.tp > shown:
        columns = [*columns[: shown - 1], columns[-1]]
    if not few and mesh.dp > shown:
        rows = [0, 1, mesh.dp - 1]
    heads = [f"tp{tp}".ljust(width) for tp in columns[:shown]]
    console.print(f"[dim]{'':6}{'  '.join(heads).rstrip()}[/dim]")
    for dp in rows:
        if dp > 2 and rows[-1] == dp and len(rows) < mesh.dp:
            console.print(f"[dim]{DOTS}[/dim]")
        cells = [_cell(mesh, dp * mesh.tp + tp).ljust(width) for tp in columns]
        if len(columns) < mesh.tp:
            cells[-2] = DOTS.ljust(width)
        for start in range(0, len(cells), shown):
            head = f"dp{dp}" if start == 0 else ""
            console.print(
                f"[dim]{head:<5}[/dim] {'  '.join(cells[start : start + shown])}".rstrip()
            )
    console.print()


def _cell(mesh: Mesh, rank: int) -> str:
    return f"rank {rank} {place(mesh, mesh.coords(rank))}".rstrip()


def _draw_rule(row: Row, console: Console) -> None:
    """A line with the bytes that rank 0 holds by it, then one a parameter it names."""
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


def _draw_meeting(row: Row, prepared: Prepared, explained: Explained, console: Console) -> None:
    for said in meeting(row, explained, prepared.plan.mesh):
        console.print(f"           [magenta]{said}[/magenta]")


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
        total = sent(steps, prepared.spec.num_hidden_layers)
        console.print(f"      [dim]{'a token, all layers':<46}[/dim] {total:>13,.0f}")


def _step(prepared: Prepared, step: Collective) -> str:
    where = over(step, prepared.plan.mesh)
    often = how_often(step, prepared.spec.num_hidden_layers)
    numbers = f"{where}{per_token(step):>{26 - len(where)}}"
    return f"{step.name:<18} {step.op:<14} {numbers}  [dim]{often}[/dim]"


def _draw_memory(prepared: Prepared, explained: Explained, console: Console) -> None:
    """A column for each set of ranks alike, the fullest and the emptiest where there are many."""
    load, mesh = explained.load, prepared.plan.mesh
    asked = f"{plural(load.sequences(mesh), 'sequence')} of {plural(load.context, 'token')}"
    console.print(f"\n[bold]memory a rank[/bold]  {asked}, steps of {load.step(mesh)}")
    shown = _columns(explained.alike)
    heads = [_head(alike) for alike in shown]
    console.print(f"[dim]{'':22}{''.join(f'{head:>16}' for head in heads)}[/dim]")
    for field, (name, exact) in MEMORY.items():
        cells = "".join(f"{size(getattr(alike.memory, field)):>16}" for alike in shown)
        console.print(f"      {name:<16}{cells}  [dim]{exact}[/dim]")
    memory = shown[0].memory
    console.print(f"      [dim]{_fullest(memory)}[/dim]")


def _columns(alike: Sequence[Alike]) -> Sequence[Alike]:
    if len(alike) <= 3:
        return alike
    order = sorted(alike, key=lambda each: -each.memory.total)
    return [order[0], order[-1]]


def _head(alike: Alike) -> str:
    name = named(alike.ranks)
    return name if len(name) < 16 else f"{len(alike.ranks)} as rank {alike.ranks[0]}"


def _fullest(memory: Memory) -> str:
    moment = max(memory.moments, key=lambda name: memory.moments[name])
    where = {
        "attention": "attention: the reference holds all scores",
        "experts": "the experts, at uniform routing",
        "head": "the head",
    }
    return f"activations are fullest in {where[moment]}"


def _draw_reads(explained: Explained, console: Console) -> None:
    console.print("\n[bold]a rank keeps[/bold]")
    whole = explained.checkpoint_bytes
    sums: dict[int, list[int]] = {}
    for alike in explained.alike:
        sums.setdefault(alike.memory.weights, []).extend(alike.ranks)
    for nbytes, ranks in sums.items():
        share = f"{nbytes:,} bytes, {100 * nbytes / whole:.1f}% of {size(whole)}"
        name = named(sorted(ranks))
        if len(name) > 14:  # then the figures go to a line of their own
            console.print(f"      {name}")
            name = ""
        console.print(f"      {name:<14} {size(nbytes):>10}  [dim]{share}[/dim]")


def _draw_replicated(explained: Explained, console: Console) -> None:
    nbytes = sum(whole.nbytes for whole in explained.whole)
    share = f"{100 * explained.replicated:.2f}% of the weights, {size(nbytes)}"
    console.print(f"\n[bold]whole on every rank[/bold]  {share}")
    for whole in explained.whole[:MOST_WHOLE]:
        console.print(f"      {escape(whole.name):<42} {size(whole.nbytes):>10}")
        console.print(f"           [dim]{whole.advice}[/dim]")
    rest = explained.whole[MOST_WHOLE:]
    if rest:
        more = size(sum(whole.nbytes for whole in rest))
        console.print(f"      [dim]{f'{len(rest)} more':<42}[/dim] {more:>10}")


def _draw_proofs(prepared: Prepared, console: Console) -> None:
    console.print("\n[bold]proved[/bold]")
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="dim")
    table.add_column()
    for proof in prepared.proofs:
        name = Text.assemble(("✓ ", "green"), proof.name)
        table.add_row(name, f"{proof.facts:,}", Text(proof.text))
    console.print(table)
