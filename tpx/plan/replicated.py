"""What a plan leaves whole on every rank, the largest first, and the style that would cut it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import or_list
from ..families.layout import Layout, Parameter
from ..families.steps import Cut
from ..index import CheckpointIndex
from ..mesh import AXES, Mesh
from .modules import modules_of
from .styles import cut_by, fitting


class Whole(NamedTuple):
    """A module, or a parameter of one that is else cut, that lies whole on every rank.

    nbytes: of all its copies. advice: a phrase.
    """

    name: str
    nbytes: int
    advice: str


def whole_modules(
    layout: Layout, index: CheckpointIndex, mesh: Mesh, cuts: Mapping[str, Cut]
) -> tuple[Whole, ...]:
    """By size. cuts: of any rank."""
    found: list[Whole] = []
    for module, parameters in modules_of(layout).items():
        kept = {name: same for name, same in parameters.items() if not _is_cut(same[0], cuts)}
        parts = {module: list(kept.values())}
        if len(kept) < len(parameters):
            parts = {name: [same] for name, same in kept.items()}
        for name, kinds in parts.items():
            nbytes = sum(_nbytes(p, index) for same in kinds for p in same)
            if nbytes:
                largest = max(kinds, key=lambda same: _nbytes(same[0], index))
                found.append(Whole(name, nbytes, _advice(largest[0], layout, mesh)))
    return tuple(sorted(found, key=lambda whole: -whole.nbytes))


def _is_cut(parameter: Parameter, cuts: Mapping[str, Cut]) -> bool:
    return any(dim.logical and cuts[dim.logical].axis for dim in parameter.dims)


def _nbytes(parameter: Parameter, index: CheckpointIndex) -> int:
    return sum(index.tensors[name].nbytes for name in {s.tensor for s in parameter.sources})


def _advice(parameter: Parameter, layout: Layout, mesh: Mesh) -> str:
    own = {dim.logical for dim in parameter.dims}
    for style in fitting(parameter, layout):
        axes = {layout.dims[name].axis for name in cut_by(style, parameter, layout) & own}
        if axes and all(getattr(mesh, axis) == 1 for axis in axes):
            ordered = or_list(axis for axis in AXES if axis in axes)
            return f"`{style}` cuts it where {ordered} is over 1"
        if axes:
            return f"`{style}` would cut it"
    if parameter.sums_over:
        return "a bias on a sum, which is added once"
    return "no style cuts it"
