"""What changes from one plan to another: bytes that each rank must read anew, and collectives.

Exact, from the ranges that each rank holds. Rank r of one plan is rank r of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from ..families.layout import Dim, Parameter
from ..families.steps import Collective, Cut
from ..index import DTYPE_BITS
from .cuts import cuts_of
from .dispatch import choose_dispatch
from .memory import Weights
from .modules import modules_of
from .prepare import Prepared

Cuts = dict[str, Cut]


class Moved(NamedTuple):
    """One module. before, after: bytes on the rank that holds most. most: bytes that one rank must
    read and did not hold, the largest; moved: the same over all ranks."""

    module: str
    before: int
    after: int
    most: int
    moved: int


class Side(NamedTuple):
    """One plan's totals. fullest: bytes of the rank that holds most; held: of all ranks."""

    path: str
    mesh: str
    world: int
    fullest: int
    held: int


class Change(NamedTuple):
    """A collective of one phase, in one plan or both; None: it is not there."""

    phase: str
    name: str
    before: Collective | None
    after: Collective | None
    sizes: tuple[int, int]  # ranks of its groups, before and after

    @property
    def kind(self) -> str:
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        alike = self.before == self.after and self.sizes[0] == self.sizes[1]
        return "unchanged" if alike else "changed"


class Difference(NamedTuple):
    """moved: None where the worlds differ. rank_moved: bytes that each rank must read anew."""

    before: Side
    after: Side
    moved: tuple[Moved, ...] | None
    rank_moved: tuple[int, ...]
    changes: tuple[Change, ...]


def diff(before: Prepared, after: Prepared) -> Difference:
    """Both for the same checkpoint."""
    assert before.index.header_digest == after.index.header_digest
    ranks = [_ranks(side) for side in (before, after)]
    sides = _side(before, ranks[0]), _side(after, ranks[1])
    changes = tuple(c for phase in ("prefill", "decode") for c in _changes(before, after, phase))
    if before.world != after.world:
        return Difference(*sides, None, (), changes)
    pairs = list(zip(*ranks, strict=True))
    tables = {
        module: [_bytes(before, list(kinds.values()), pair) for pair in pairs]
        for module, kinds in modules_of(before.layout).items()
    }
    moved = tuple(
        Moved(
            module,
            max(row.before for row in rows),
            max(row.after for row in rows),
            max(row.new for row in rows),
            sum(row.new for row in rows),
        )
        for module, rows in tables.items()
    )
    totals = tuple(sum(rows[rank].new for rows in tables.values()) for rank in range(before.world))
    return Difference(*sides, moved, totals, changes)


def _ranks(prepared: Prepared) -> list[Cuts]:
    mesh, cut = prepared.plan.mesh, set(prepared.assigned.cut)
    return [
        cuts_of(prepared.layout, cut, mesh, mesh.coords(rank)) for rank in range(prepared.world)
    ]


def _side(prepared: Prepared, ranks: Sequence[Cuts]) -> Side:
    weights = Weights.of(prepared.layout, prepared.index)
    held = [weights.nbytes(cuts, prepared.layout) for cuts in ranks]
    plan = prepared.plan
    return Side(plan.path, str(plan.mesh), prepared.world, max(held), sum(held))


class _Bytes(NamedTuple):
    """Of one module on one rank. new: of `after`, those that `before` did not hold."""

    before: int
    after: int
    new: int


def _bytes(prepared: Prepared, kinds: Sequence[list[Parameter]], pair: tuple[Cuts, Cuts]) -> _Bytes:
    first, second = pair
    both = {
        name: max(0, min(cut.stop, second[name].stop) - max(cut.start, second[name].start))
        for name, cut in first.items()
    }
    sizes = [{name: cut.size for name, cut in cuts.items()} for cuts in pair]
    totals = [0, 0, 0]
    for same in kinds:
        bits = DTYPE_BITS[prepared.index.tensors[same[0].sources[0].tensor].dtype]
        for i, held in enumerate((*sizes, both)):
            elements = prod(_local(dim, held) for dim in same[0].dims)
            totals[i] += len(same) * elements * bits // 8
    return _Bytes(totals[0], totals[1], totals[1] - totals[2])


def _local(dim: Dim, held: dict[str, int]) -> int:
    return dim.size * held[dim.logical] // dim.units if dim.logical else dim.size


def _changes(before: Prepared, after: Prepared, phase: str) -> list[Change]:
    """In the order of a forward pass, those of `before` first where only one plan has them."""
    first, second = _collectives(before, phase), _collectives(after, phase)
    names = [name for name in first if name in second or name != "head"]
    names += [name for name in (*second, *first) if name not in names]
    return [
        Change(
            phase,
            name,
            first.get(name),
            second.get(name),
            (_peers(before, first.get(name)), _peers(after, second.get(name))),
        )
        for name in dict.fromkeys(names)
    ]


def _collectives(prepared: Prepared, phase: str) -> dict[str, Collective]:
    mesh = prepared.plan.mesh
    cuts = cuts_of(prepared.layout, set(prepared.assigned.cut), mesh, mesh.coords(0))
    dispatch = getattr(choose_dispatch(prepared.plan), phase)
    steps = prepared.family.collectives(prepared.spec, mesh, cuts, dispatch)
    return {step.name: step for step in steps}


def _peers(prepared: Prepared, step: Collective | None) -> int:
    return 0 if step is None else prepared.plan.mesh.size(step.group)
