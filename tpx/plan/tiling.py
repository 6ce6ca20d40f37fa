"""Proves on resolved shards that the ranks hold each parameter together, evenly, in whole blocks.

Styles split logical dimensions with split(), so no plan can break this: it holds layouts, cuts and
resolve to it, for every mesh. Faults are PlanError P2xx.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..errors import PlanError
from ..families.layout import Layout, Range
from ..families.steps import Cut
from .held import Held
from .match import at
from .types import Plan, Rule, Shard
from .values import units_of

Box = tuple[tuple[Range, ...], ...]  # of each dimension of a parameter, its ranges


def check_blocks(plan: Plan, layout: Layout, cuts: list[dict[str, Cut]]) -> int:
    """Each cut starts and ends between quantised blocks; -> facts."""
    pers = {
        (dim.logical, dim.per)
        for parameter in layout.parameters.values()
        for dim in parameter.dims
        if dim.logical
    }
    grain: dict[str, int] = {}
    for name, per in pers:
        grain[name] = max(grain.get(name, 1), per, layout.dims[name].unit)
    seen = {(name, cut) for mine in cuts for name, cut in mine.items() if name in grain}
    for name, cut in sorted(seen):
        for end in (cut.start, cut.stop):
            if end % grain[name]:
                raise PlanError(
                    f"plan `{plan.path}`: a cut of {layout.dims[name].config_key} at {end} falls "
                    f"inside a block of {grain[name]}",
                    f"cut at multiples of {grain[name]}",
                    code="P203",
                )
    return len(seen)


def check_tiling(held: Held) -> int:
    """-> parameters, each proved on all ranks. Raises PlanError."""
    for name in held.of:
        shards = [mine[name] for mine in held.shards]
        _check_ranges(held, name, {id(shard): shard for shard in shards})
        fault = _fault(Counter(shard.ranges for shard in shards), shards[0], held, name)
        if fault:
            raise PlanError(
                f"{at(held.plan, Rule('', '', shards[0].line))}: the ranks' shards of `{name}` "
                f"{fault}",
                "no plan is at fault: the family's layout is",
                code="P204",
            )
    return sum(held.of.values())


def _check_ranges(held: Held, name: str, shards: Mapping[int, Shard]) -> None:
    """Gate and up, or blocks and their scales: one run of units in every copy."""
    parameter = held.layout.parameters[name]
    for shard in shards.values():
        for dim, ranges in zip(parameter.dims, shard.ranges, strict=True):
            if units_of(dim, ranges) is None:
                raise PlanError(
                    f"{at(held.plan, Rule('', '', shard.line))}: ranges `{list(ranges)}` of "
                    f"`{name}` are not one run of `{dim.logical or 'a whole dimension'}`",
                    "no plan is at fault: the family's layout is",
                    code="P205",
                )


def _fault(boxes: Counter[Box], first: Shard, held: Held, name: str) -> str | None:
    """What is wrong with boxes on a grid, each held by as many ranks as the counter says."""
    shape = held.layout.parameters[name].shape
    there = {box: n for box, n in boxes.items() if all(any(a < b for a, b in r) for r in box)}
    cells = 1
    for i, size in enumerate(shape):
        columns = {box[i] for box in there}
        cells *= len(columns)
        done = 0
        for start, stop in sorted(r for ranges in columns for r in ranges if r[0] < r[1]):
            if start != done:
                fault = f"leave a gap at {done}" if start > done else f"overlap at {start}"
                return f"{fault} of {size}"
            done = stop
        if done != size:
            return f"end at {done} of {size}"
    if cells != len(there):
        return f"are {len(there)} pieces of {cells}"
    if len(set(there.values())) > 1:
        return f"are held by {min(there.values())} to {max(there.values())} ranks, a piece"
    return None
