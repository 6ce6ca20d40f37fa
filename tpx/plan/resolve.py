"""Plan x layout x headers -> RankPlan: which pieces of which tensors one rank holds.

Expects what proofs.py proved. Reads nothing: offsets come from the index.
"""

from __future__ import annotations

from ..families.layout import Layout, Parameter, Range, Source
from ..families.spec import ModelSpec
from ..families.steps import Cut
from ..index import CheckpointIndex, TensorMeta
from .cuts import Assigned, assign, cuts_of
from .dispatch import choose_dispatch, owners
from .styles import cut_by
from .types import Part, Plan, RankPlan, Rule, Shard


def resolve(
    plan: Plan,
    spec: ModelSpec,
    layout: Layout,
    index: CheckpointIndex,
    rank: int,
    assigned: Assigned | None = None,
    *,
    prove: bool = True,
) -> RankPlan:
    """What `rank` holds of every parameter, in the layout's order.

    assigned: what assign(plan, layout) gave, where it is known already. prove: False, for tests
    alone, takes a wrong plan at its word; what no rule names is still an error.
    """
    rule_of, cut = assigned or assign(plan, layout, prove)
    cuts = cuts_of(layout, cut, plan.mesh, plan.mesh.coords(rank))
    shards = {
        name: shard_of(parameter, layout, rule_of[name], cuts, index.tensors)
        for name, parameter in layout.parameters.items()
    }
    owner_E, slot_E = owners(spec.num_local_experts, plan.mesh.ep)
    dispatch = choose_dispatch(plan, prove)
    return RankPlan(rank, plan.mesh, spec, shards, cuts, dispatch, owner_E, slot_E)


def shard_of(
    parameter: Parameter,
    layout: Layout,
    rule: Rule,
    cuts: dict[str, Cut],
    tensors: dict[str, TensorMeta],
) -> Shard:
    """What the rank with these cuts holds of one parameter."""
    done = cut_by(rule.style, parameter, layout)
    ranges = tuple(
        dim.ranges(cuts[dim.logical].start, cuts[dim.logical].stop)
        if dim.logical in done
        else ((0, dim.size),)
        for dim in parameter.dims
    )
    parts = (_part(source, tensors[source.tensor], ranges) for source in parameter.sources)
    partial = parameter.sums_over != "" and cuts[parameter.sums_over].axis is not None
    return Shard(
        shape=tuple(_length(r) for r in ranges),
        dtype=tensors[parameter.sources[0].tensor].dtype,
        parts=() if parameter.tied_to else tuple(part for part in parts if part is not None),
        style=rule.style,
        line=rule.line,
        ranges=ranges,
        add_once=partial,
        tied_to=parameter.tied_to,
    )


def _length(ranges: tuple[Range, ...]) -> int:
    return sum(stop - start for start, stop in ranges)


def _part(source: Source, meta: TensorMeta, ranges: tuple[tuple[Range, ...], ...]) -> Part | None:
    """Where the source's box meets the shard's ranges; None: nowhere."""
    stacked = len(ranges) - len(source.shape)  # leading dimensions that the tensor does not have
    index: list[tuple[Range, ...]] = []
    at: list[int] = []
    for i, held in enumerate(ranges):
        low = source.at[i]
        size = 1 if i < stacked else source.shape[i - stacked]
        met, place = _meet(held, low, low + size)
        if not met:
            return None
        at.append(place)
        if i >= stacked:
            shift = source.begin[i - stacked] - low
            index.append(tuple((start + shift, stop + shift) for start, stop in met))
    return Part(meta, tuple(index), tuple(at))


def _meet(held: tuple[Range, ...], low: int, high: int) -> tuple[list[Range], int]:
    """The pieces of `held` inside [low, high), and where the first one lies in the shard.

    `held` is ascending and [low, high) is one interval, so the pieces follow each other in the
    shard without a gap.
    """
    met: list[Range] = []
    place = first = 0
    for start, stop in held:
        inside = max(start, low), min(stop, high)
        if inside[0] < inside[1]:
            if not met:
                first = place + inside[0] - start
            met.append(inside)
        place += stop - start
    return met, first
