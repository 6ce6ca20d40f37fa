"""What a prepared plan does, as values: rules with shapes and bytes, collectives, totals.

cli/plan.py draws them. Exact, from config and headers; all-to-all bytes assume uniform routing.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from ..families.layout import Parameter
from ..families.steps import Collective, Cut
from ..index import DTYPE_BITS
from .cuts import cuts_of
from .dispatch import choose_dispatch
from .memory import Weights, kv_bytes
from .patterns import generalised
from .prepare import Prepared
from .styles import cut_by
from .types import DispatchPlan, Rule

Shape = tuple[int, ...]


class Kind(NamedTuple):
    """Parameters of one rule that differ by layer number alone. nbytes: of all, on rank 0.

    odd: the first rank whose shape differs from rank 0's, and that shape.
    """

    name: str
    copies: int
    dtype: str
    whole: Shape
    first: Shape
    odd: tuple[int, Shape] | None
    nbytes: int


class Row(NamedTuple):
    """A rule and what it matches. nbytes: on rank 0."""

    rule: Rule
    kinds: tuple[Kind, ...]

    @property
    def nbytes(self) -> int:
        return sum(kind.nbytes for kind in self.kinds)


class Explained(NamedTuple):
    """rank_bytes: weights of each rank, which is what it reads. kv_bytes: on rank 0, one sequence
    of all the model's positions."""

    rows: tuple[Row, ...]
    dispatch: DispatchPlan
    prefill: tuple[Collective, ...]
    decode: tuple[Collective, ...]
    rank_bytes: tuple[int, ...]
    checkpoint_bytes: int
    kv_bytes: int


def explain(prepared: Prepared) -> Explained:
    plan, layout, spec = prepared.plan, prepared.layout, prepared.spec
    cuts = [
        cuts_of(layout, prepared.assigned.cut, plan.mesh, plan.mesh.coords(rank))
        for rank in range(plan.mesh.world)
    ]
    weights = Weights.of(layout, prepared.index)
    dispatch = choose_dispatch(plan)
    prefill, decode = (
        prepared.family.collectives(spec, plan.mesh, cuts[0], name) for name in dispatch
    )
    return Explained(
        rows=_rows(prepared, _different(cuts)),
        dispatch=dispatch,
        prefill=prefill,
        decode=decode,
        rank_bytes=tuple(weights.nbytes(held, layout) for held in cuts),
        checkpoint_bytes=sum(meta.nbytes for meta in prepared.index.tensors.values()),
        kv_bytes=kv_bytes(spec, cuts[0]["KV"].size, spec.max_position_embeddings, 1),
    )


Cuts = dict[str, Cut]


def _different(cuts: list[Cuts]) -> dict[int, Cuts]:
    """The first rank of each set of local sizes: all others look like one of these."""
    seen: dict[Shape, tuple[int, Cuts]] = {}
    for rank, held in enumerate(cuts):
        seen.setdefault(tuple(cut.size for cut in held.values()), (rank, held))
    return dict(seen.values())


def _rows(prepared: Prepared, ranks: dict[int, Cuts]) -> tuple[Row, ...]:
    alike: dict[tuple[Rule, str], list[Parameter]] = {}
    for name, parameter in prepared.layout.parameters.items():
        key = (prepared.assigned.rule_of[name], generalised(name))
        alike.setdefault(key, []).append(parameter)
    return tuple(
        Row(
            rule,
            tuple(
                _kind(prepared, name, parameters, ranks)
                for (other, name), parameters in alike.items()
                if other == rule
            ),
        )
        for rule in prepared.plan.rules
    )


def _kind(prepared: Prepared, name: str, alike: list[Parameter], ranks: dict[int, Cuts]) -> Kind:
    parameter = alike[0]
    rule = prepared.assigned.rule_of[parameter.name]
    done = cut_by(rule.style, parameter, prepared.layout)
    shapes = {rank: _shape(parameter, done, cuts) for rank, cuts in ranks.items()}
    odd = next(((rank, shape) for rank, shape in shapes.items() if shape != shapes[0]), None)
    dtype = prepared.index.tensors[parameter.sources[0].tensor].dtype
    held = 0 if parameter.tied_to else len(alike)
    nbytes = held * prod(shapes[0]) * DTYPE_BITS[dtype] // 8
    return Kind(name, len(alike), dtype, parameter.shape, shapes[0], odd, nbytes)


def _shape(parameter: Parameter, done: set[str], cuts: Cuts) -> Shape:
    return tuple(
        sum(stop - start for start, stop in dim.ranges(*cuts[dim.logical][1:]))
        if dim.logical in done
        else dim.size
        for dim in parameter.dims
    )
