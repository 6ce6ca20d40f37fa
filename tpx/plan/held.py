"""What every rank holds, made once for parameters and ranks that are cut alike.

Ranks of a large mesh and layers of a deep model repeat a few shards: proofs look at those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..families.layout import Dim, Layout
from ..families.steps import Collective, Cut
from ..index import CheckpointIndex
from ..mesh import AXES, Mesh
from .cuts import Assigned, cuts_along
from .patterns import generalised
from .resolve import shard_of
from .styles import cut_by
from .types import Plan, Shard

Kind = tuple[tuple[Dim, ...], frozenset[str], str]


class Held(NamedTuple):
    """By rank: the units of each logical dimension, and the shards of some parameters.

    of: those parameters, each with the number of parameters that are cut like it. layers: for each
    set of layers that are cut alike, the number of one, and how many they are.
    """

    plan: Plan
    layout: Layout
    cuts: Sequence[Mapping[str, Cut]]
    shards: Sequence[Mapping[str, Shard]]
    of: Mapping[str, int]
    layers: Mapping[int, int]


class Sent(NamedTuple):
    """A forward's collectives, by rank. name: of the dispatch."""

    name: str
    collectives: Sequence[tuple[Collective, ...]]


def hold(plan: Plan, layout: Layout, index: CheckpointIndex, assigned: Assigned) -> Held:
    """Expects what cuts.py proved."""
    rule_of, cut = assigned
    cuts = cuts_by_rank(layout, cut, plan.mesh)
    kinds = {
        name: (parameter.dims, frozenset(cut_by(rule_of[name].style, parameter, layout)),
               parameter.sums_over + (parameter.tied_to or ""))
        for name, parameter in layout.parameters.items()
    }  # fmt: skip
    layers = _layers(kinds)
    of = _representatives(kinds, layers)
    made: dict[tuple[object, ...], Shard] = {}
    shards: list[dict[str, Shard]] = []
    for mine in cuts:
        found = {}
        for name in of:
            parameter = layout.parameters[name]
            names = {dim.logical for dim in parameter.dims} | {parameter.sums_over}
            key = (name, *(mine[each] for each in sorted(names) if each))
            if key not in made:
                made[key] = shard_of(parameter, layout, rule_of[name], mine, index.tensors)
            found[name] = made[key]
        shards.append(found)
    return Held(plan, layout, cuts, shards, of, layers)


def cuts_by_rank(layout: Layout, cut: Iterable[str], mesh: Mesh) -> list[dict[str, Cut]]:
    """cuts_of for every rank of the mesh."""
    cut = set(cut)
    found = {
        name: cuts_along(dim, name in cut, getattr(mesh, dim.axis))
        for name, dim in layout.dims.items()
    }
    places = [dict(zip(AXES, mesh.coords(rank), strict=True)) for rank in range(mesh.world)]
    return [
        {name: found[name][place[dim.axis]] for name, dim in layout.dims.items()}
        for place in places
    ]


def _layer(name: str) -> int | None:
    """The number in a parameter's name."""
    return next((int(word) for word in name.split(".") if word.isdecimal()), None)


def _layers(kinds: Mapping[str, Kind]) -> dict[int, int]:
    """The first layer of each set that is cut alike -> how many layers the set has."""
    told: dict[int, list[tuple[str, Kind]]] = {}
    for name, kind in kinds.items():
        number = _layer(name)
        if number is not None:
            told.setdefault(number, []).append((generalised(name), kind))
    first: dict[tuple[tuple[str, Kind], ...], int] = {}
    count: dict[int, int] = {}
    for number, said in told.items():
        one = first.setdefault(tuple(said), number)
        count[one] = count.get(one, 0) + 1
    return count


def _representatives(kinds: Mapping[str, Kind], layers: Mapping[int, int]) -> dict[str, int]:
    """Every parameter outside a layer, and those of one layer of each set."""
    found = {}
    for name in kinds:
        number = _layer(name)
        if number is None or number in layers:
            found[name] = 1 if number is None else layers[number]
    return found
