"""`tpx plan explain --simulate`: the collectives of one rank, as predicted and as recorded.

The one part of `tpx plan` that needs torch, which it imports when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..plan.prepare import Prepared

if TYPE_CHECKING:
    from ..simulate import Row, Simulation

TOKENS = 16  # of each dp group, to prefill and then to decode


def simulated(prepared: Prepared, rank: int) -> list[Simulation]:
    """One prefill and one decode of `rank`."""
    from ..simulate import simulate

    return [simulate(prepared, rank, TOKENS, phase) for phase in ("prefill", "decode")]


def draw(found: Sequence[Simulation], console: Console) -> None:
    """A line for each collective: its calls in all layers together."""
    for simulation in found:
        console.print(
            f"\n[bold]simulated[/bold]  rank {simulation.rank}, {simulation.phase} of "
            f"{simulation.tokens} tokens, hidden size {simulation.spec.hidden_size}"
        )
        if not simulation.rows:
            console.print("      [dim]no collective[/dim]")
            continue
        title = f"{'name':<18} {'op':<14} {'calls':>5} {'predicted':>12} {'recorded':>12}"
        console.print(f"      [dim]{title}[/dim]")
        for rows in _by_name(simulation.rows):
            first = rows[0]
            sums = [sum(n or 0 for n in side) for side in zip(*map(_bytes, rows), strict=True)]
            numbers = f"{len(rows):>5} {sums[0]:>12,} {sums[1]:>12,}"
            mark = "[green]equal[/green]" if all(r.equal for r in rows) else "[red]differs[/red]"
            console.print(f"      {first.name:<18} {first.op:<14} {numbers}  {mark}")
        _draw_first_fault(simulation.rows, console)


def _by_name(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.name, row.op, row.group), []).append(row)
    return list(found.values())


def _bytes(row: Row) -> tuple[int | None, int | None]:
    return row.predicted, row.recorded


def _draw_first_fault(rows: Sequence[Row], console: Console) -> None:
    wrong = next((row for row in rows if not row.equal), None)
    if wrong is not None:
        where = "outside the layers" if wrong.layer is None else f"in layer {wrong.layer}"
        console.print(
            f"      [red]first difference[/red] {where}: {wrong.name}, {wrong.op} over "
            f"{wrong.group}: {_said(wrong.predicted)} predicted, {_said(wrong.recorded)} recorded"
        )


def _said(nbytes: int | None) -> str:
    return "none" if nbytes is None else f"{nbytes:,} bytes"


def as_json(found: Sequence[Simulation]) -> list[dict[str, Any]]:
    return [
        {
            "rank": simulation.rank,
            "phase": simulation.phase,
            "tokens": simulation.tokens,
            "hidden_size": simulation.spec.hidden_size,
            "equal": simulation.equal,
            "calls": [row._asdict() for row in simulation.rows],
        }
        for simulation in found
    ]
