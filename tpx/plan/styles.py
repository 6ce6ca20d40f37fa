"""What each style cuts of a parameter, and which styles fit it: read off its logical dimensions."""

from __future__ import annotations

from ..families.layout import Layout, Parameter
from .types import STYLES


def cut_by(style: str, parameter: Parameter, layout: Layout) -> set[str]:
    """The logical dimensions of `parameter` that `style` splits, or whose split it follows.

    colwise: the first dimension. rowwise: the last one, or for a bias the dimension that its
    weights sum over. vocab: the rows of a table. expert: every dimension on an expert axis.
    Empty where the style does not fit.
    """
    names = [dim.logical for dim in parameter.dims]
    tp = {name for name, dim in layout.dims.items() if dim.axis == "tp"}
    tables = {name for name in tp if layout.dims[name].table}
    inside = {name for name in names if name and layout.dims[name].axis != "tp"}
    match style:
        case "colwise":
            return {names[0]} & (tp - tables)
        case "rowwise":
            last = names[-1] if len(names) > 1 else parameter.sums_over
            return {last} & (tp - tables)
        case "vocab":
            return {names[0]} & tables
        case "expert":
            sums_over = {parameter.sums_over} & layout.dims.keys()
            return inside | (sums_over - tp) if inside else set()
        case "replicate":
            return set()
    raise AssertionError(f"{style=} is none of {STYLES}")


def fitting(parameter: Parameter, layout: Layout) -> list[str]:
    """The styles that fit; `replicate` always does."""
    return [s for s in STYLES if s == "replicate" or cut_by(s, parameter, layout)]


def logical_of(parameter: Parameter) -> set[str]:
    """The logical dimensions that a parameter has or sums over."""
    return {dim.logical for dim in parameter.dims if dim.logical} | (
        {parameter.sums_over} if parameter.sums_over else set()
    )
