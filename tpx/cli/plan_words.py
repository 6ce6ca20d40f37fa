"""How `tpx plan` writes bytes, shapes, ranks and collectives, in tables and on the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ..families.steps import Collective
from ..mesh import Coords, Mesh
from ..plan.explain import Explained, Kind, Row, Shape

MOST_RUNS = 3


def size(nbytes: float) -> str:
    """Decimal units, as disks and cards are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def short(kind: Kind) -> str:
    """The last name of a parameter, with its module's where that says nothing."""
    *_, owner, last = ["", *kind.name.split(".")]
    if last not in ("weight", "bias"):
        return last
    return f"{owner}.{last}" if len(owner) < 14 else owner


def runs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring ranks in one: (first, last)."""
    parts = [
        [rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda at: at[1] - at[0])
    ]
    return [(part[0], part[-1]) for part in parts]


def named(ranks: Sequence[int]) -> str:
    """`rank 5`, `ranks 0-1, 4-5`, or `ranks 0-1, 4-5, ... (512)` where there are many runs."""
    found = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs(ranks)]
    if len(ranks) == 1:
        return f"rank {found[0]}"
    if len(found) > MOST_RUNS:
        return f"ranks {', '.join(found[: MOST_RUNS - 1])}, ... ({len(ranks)})"
    return f"ranks {', '.join(found)}"


def place(mesh: Mesh, where: Coords) -> str:
    """Where a rank stands on the expert axes: `ep3 etp0`."""
    axes = [axis for axis in ("edp", "ep", "etp") if getattr(mesh, axis) > 1]
    return " ".join(f"{axis}{getattr(where, axis)}" for axis in axes)


def per_token(step: Collective) -> str:
    return f"{step.nbytes:,.0f}" if step.per_token else f"{step.nbytes:,.0f} in all"


def how_often(step: Collective, layers: int) -> str:
    if step.name == "head":
        return "a logits row"
    return plural(layers, "layer") if step.per_layer else "once"


def over(step: Collective, mesh: Mesh) -> str:
    return f"{step.group} of {mesh.size(step.group)}"


def sent(steps: Sequence[Collective], layers: int) -> float:
    """Bytes that a rank puts in for each token of its own, over all layers, without the head's."""
    counted = [step for step in steps if step.per_token and step.name != "head"]
    return sum(step.nbytes * (layers if step.per_layer else 1) for step in counted)


def meeting(row: Row, explained: Explained, mesh: Mesh) -> list[str]:
    """Where a rule's results meet: the collective, or how many, and bytes a token; a line for both
    phases, or one each where they differ."""
    phases = {"prefill: ": explained.prefill, "decode: ": explained.decode}
    mine = {
        phase: [step for step in steps if step.name in row.collectives]
        for phase, steps in phases.items()
    }
    if mine["prefill: "] == mine["decode: "]:
        mine = {"": mine["decode: "]}
    return [phase + _meeting(steps, mesh) for phase, steps in mine.items() if steps]


def _meeting(steps: Sequence[Collective], mesh: Mesh) -> str:
    nbytes = sum(step.nbytes for step in steps if step.per_token)
    what = f"{steps[0].op} over {over(steps[0], mesh)}"
    if len(steps) > 1:
        what = f"{len(steps)} collectives"
    each = "row of logits" if steps[0].name == "head" else "token"
    return f"{what}, {nbytes:,.0f} bytes a {each}"
