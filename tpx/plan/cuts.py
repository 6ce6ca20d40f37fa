"""How a plan cuts the logical dimensions: parameters that share one agree, and each axis fits.

The messages state the arithmetic and the values that would work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..errors import PlanError
from ..families.layout import Layout, Logical
from ..families.steps import Cut
from ..mesh import Coords, Mesh
from ..split import split
from .match import at, match_rules
from .patterns import generalised
from .styles import cut_by, fitting, logical_of
from .types import Plan, Rule

KERNEL_TILE = 64  # the matmul kernels round a rank's part of a contracted dimension up to this
MOST_LISTED = 6
MOST_PARTS = 16


class Assigned(NamedTuple):
    """rule_of: of each parameter. cut: the logical dimensions cut, each with a rule that does."""

    rule_of: dict[str, Rule]
    cut: dict[str, Rule]


def assign(plan: Plan, layout: Layout, prove: bool = True) -> Assigned:
    """Raises PlanError where rules and parameters do not pair, or compute wrongly together.

    prove: False lets all pass but a parameter without a rule.
    """
    rule_of = match_rules(plan, layout, prove)
    return Assigned(rule_of, split_dims(plan, layout, rule_of, prove))


class Seen(NamedTuple):
    """A parameter that has a logical dimension, or sums over it."""

    rule: Rule
    parameter: str
    logical: str


def split_dims(
    plan: Plan, layout: Layout, rule_of: dict[str, Rule], prove: bool = True
) -> dict[str, Rule]:
    """The logical dimensions that the rules cut, each with the first rule that cuts it.

    Raises PlanError where two parameters that share a dimension are not cut alike: the plan would
    compute wrongly.
    """
    cut: dict[str, Seen] = {}
    kept: dict[str, Seen] = {}
    partner = {name: group for group in layout.together for name in group}
    for name, parameter in layout.parameters.items():
        done = cut_by(rule_of[name].style, parameter, layout)
        for logical in sorted(logical_of(parameter)):
            seen = Seen(rule_of[name], name, logical)
            for alike in partner.get(logical, (logical,)) if prove else ():
                if logical in done and alike in kept:
                    raise _disagree(plan, layout, seen, kept[alike])
                if logical not in done and alike in cut:
                    raise _disagree(plan, layout, cut[alike], seen)
            (cut if logical in done else kept).setdefault(logical, seen)
    return {logical: seen.rule for logical, seen in cut.items()}


def _disagree(plan: Plan, layout: Layout, cut: Seen, whole: Seen) -> PlanError:
    """The hint gives the style that the whole one would take."""
    dim, other = layout.dims[cut.logical], layout.dims[whole.logical]
    name = generalised(whole.parameter)
    held = "it" if dim == other else other.config_key
    fits = [s for s in fitting(layout.parameters[whole.parameter], layout) if s != "replicate"]
    return PlanError(
        f"{at(plan, cut.rule, whole.rule)}: `{generalised(cut.parameter)}` cuts {dim.config_key} "
        f"over {dim.axis}, but `{name}` holds {held} whole",
        f"use `{fits[0]}` for `{name}`, or `replicate` for both",
        code="P301" if getattr(plan.mesh, dim.axis) > 1 else "P405",
    )


def check_divides(plan: Plan, layout: Layout, cut: dict[str, Rule]) -> int:
    """Proves that each cut dimension can be cut over its axis; -> how many were proved."""
    for name, rule in cut.items():
        dim = layout.dims[name]
        parts = getattr(plan.mesh, dim.axis)
        if not divides(dim, parts, rule.uneven):
            if dim.table:
                raise _no_row(plan, dim, rule, parts)
            if dim.uneven == "ask":
                raise _uneven(plan, dim, rule, parts)
            raise _not_divided(plan, layout, cut, dim, parts)
    return len(cut)


def divides(dim: Logical, parts: int, uneven: bool = False) -> bool:
    """Whether `parts` ranks can share the dimension."""
    if dim.uneven == "yes" or (dim.uneven == "ask" and uneven):
        return not dim.table or parts <= dim.units
    if dim.replicable and parts > dim.units:
        return parts % dim.units == 0
    return dim.units % parts == 0


def _no_row(plan: Plan, dim: Logical, rule: Rule, parts: int) -> PlanError:
    return PlanError(
        f"{at(plan, rule)}: `{rule.pattern}` cuts {dim.config_key} {dim.units} over {dim.axis} "
        f"{parts}, and {parts - dim.units} of the ranks would hold no row",
        f"use `replicate`, or {dim.axis} {dim.units} or less",
        code="P202",
    )


def _uneven(plan: Plan, dim: Logical, rule: Rule, parts: int) -> PlanError:
    lengths = [(stop - start) // dim.unit for start, stop in split(dim.size, parts, dim.unit)]
    padded = -(-lengths[0] * dim.unit // KERNEL_TILE) * KERNEL_TILE
    padding = 100 * (padded * parts / dim.size - 1)
    blocks = f" = {dim.units} block{'s' * (dim.units > 1)} of {dim.unit}" if dim.unit > 1 else ""
    works = [n for n in range(2, dim.units + 1) if dim.units % n == 0][:MOST_LISTED]
    instead = f", or use {dim.axis} {numbers(works)}" if works else ""
    return PlanError(
        f"{at(plan, rule)}: `{rule.pattern}` cuts {dim.config_key} {dim.size}{blocks} into "
        f"{parts} unequal parts ({_listed(lengths)})",
        f"this is exact and costs {padding:.1f}% padding in the kernel; "
        f"say `uneven: true` to accept it{instead}",
        code="P407",
    )


def _listed(lengths: list[int]) -> str:
    more = ", ..." * (len(lengths) > MOST_PARTS)
    return ", ".join(map(str, lengths[:MOST_PARTS])) + more


def _not_divided(
    plan: Plan, layout: Layout, cut: dict[str, Rule], dim: Logical, parts: int
) -> PlanError:
    """A value that works must suit every dimension that this axis cuts."""
    same_axis = [layout.dims[name] for name in cut if layout.dims[name].axis == dim.axis]
    works = [
        n
        for n in range(1, max(d.units for d in same_axis if not d.table) + 1)
        if all(divides(d, n, cut[d.name].uneven) for d in same_axis)
    ]
    rule = cut[dim.name]
    fault = f"{dim.units} / {parts} is {dim.units / parts:.4g}"
    if dim.replicable and parts > dim.units:
        fault = f"{parts} is no multiple of {dim.units}"
    return PlanError(
        f"{at(plan, rule)}: `{rule.pattern}` cuts {dim.config_key} {dim.units} over "
        f"{dim.axis} {parts}, and {fault}",
        f"use {dim.axis} {numbers(works)}",
        code="P201" if dim.axis == "tp" else "P418",
    )


def numbers(values: Iterable[int]) -> str:
    """`2, 3 or 6`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def cuts_of(layout: Layout, cut: Iterable[str], mesh: Mesh, where: Coords) -> dict[str, Cut]:
    """What the rank at `where` holds of every logical dimension, cut or not."""
    cut = set(cut)
    return {
        name: cuts_along(dim, name in cut, getattr(mesh, dim.axis))[getattr(where, dim.axis)]
        for name, dim in layout.dims.items()
    }


def cuts_along(dim: Logical, is_cut: bool, parts: int) -> list[Cut]:
    """What the rank at each of `parts` places on the dimension's axis holds of it."""
    if parts == 1 or not is_cut:
        return [Cut(None, 0, dim.size)] * parts
    # parts / units neighbours hold the same unit, the one their query heads belong to
    shared = dim.replicable and parts > dim.units
    pieces = split(dim.size, dim.units if shared else parts, dim.unit)
    return [Cut(dim.axis, *pieces[i * len(pieces) // parts]) for i in range(parts)]
