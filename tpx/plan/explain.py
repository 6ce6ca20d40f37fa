"""What a prepared plan does, as values: rules with shapes and bytes, collectives, memory.

cli/ draws them. Exact, from config and headers, but for what says `estimated`; bytes of all-to-all
assume uniform routing.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from ..errors import PlanError
from ..families.layout import Layout, Parameter
from ..families.spec import ModelSpec
from ..families.steps import Collective, Cut
from ..index import DTYPE_BITS
from .buffers import Load, logits_bytes, moments, pages_bytes
from .cuts import cuts_of
from .dispatch import choose_dispatch
from .memory import Weights, kv_bytes
from .patterns import generalised
from .prepare import Prepared
from .replicated import Whole, whole_modules
from .styles import cut_by
from .types import DispatchPlan, Plan, Rule

Shape = tuple[int, ...]
Cuts = dict[str, Cut]


class Kind(NamedTuple):
    """Parameters of one rule that differ by layer number alone. nbytes: of all, on rank 0.

    odd: the first rank whose shape differs from rank 0's, and that shape. each: bytes on the ranks
    of each of Explained.alike.
    """

    name: str
    copies: int
    dtype: str
    whole: Shape
    first: Shape
    odd: tuple[int, Shape] | None
    nbytes: int
    each: tuple[int, ...]


class Row(NamedTuple):
    """A rule and what it matches. nbytes: on rank 0. collectives: names of those where the partial
    results of its parameters meet."""

    rule: Rule
    kinds: tuple[Kind, ...]
    collectives: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(kind.nbytes for kind in self.kinds)


class Memory(NamedTuple):
    """Bytes of one rank. pages: the cache's, beyond its tokens. activations is estimated, all else
    exact; moments: what activations is the largest of."""

    weights: int
    kv_cache: int
    pages: int
    logits: int
    activations: int
    moments: dict[str, int]

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.pages + self.logits + self.activations


class Alike(NamedTuple):
    """Ranks that hold shards of the same sizes. cuts: of the first of them."""

    ranks: tuple[int, ...]
    cuts: Cuts
    memory: Memory


class Explained(NamedTuple):
    """alike: every rank once, rank 0 in the first; whole: modules that no axis cuts."""

    rows: tuple[Row, ...]
    alike: tuple[Alike, ...]
    dispatch: DispatchPlan
    prefill: tuple[Collective, ...]
    decode: tuple[Collective, ...]
    checkpoint_bytes: int
    load: Load
    whole: tuple[Whole, ...]
    replicated: float  # share of the weights' bytes that lies in modules that no axis cuts

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """Weights of each rank, as the checkpoint stores them."""
        found = {rank: each.memory.weights for each in self.alike for rank in each.ranks}
        return tuple(found[rank] for rank in range(len(found)))


def explain(prepared: Prepared, context: int | None = None, batch: int | None = None) -> Explained:
    """context, batch: what memory is counted for; None: the plan's limits, else all the model's
    positions and one sequence. Raises PlanError where the model cannot have them."""
    plan, layout, spec = prepared.plan, prepared.layout, prepared.spec
    load = _load(plan, spec, context, batch)
    weights = Weights.of(layout, prepared.index)
    dispatch = choose_dispatch(plan)
    groups = _alike(prepared)
    first = groups[0][1]
    prefill, decode = (
        prepared.family.collectives(spec, plan.mesh, first, name) for name in dispatch
    )
    alike = tuple(
        Alike(ranks, cuts, _memory(prepared, weights.nbytes(cuts, layout), cuts, dispatch, load))
        for ranks, cuts in groups
    )
    return Explained(
        rows=_rows(prepared, alike, dict.fromkeys(s.name for s in (*prefill, *decode))),
        alike=alike,
        dispatch=dispatch,
        prefill=prefill,
        decode=decode,
        checkpoint_bytes=sum(meta.nbytes for meta in prepared.index.tensors.values()),
        load=load,
        whole=whole_modules(layout, prepared.index, plan.mesh, first),
        replicated=weights.replicated(first),
    )


def _load(plan: Plan, spec: ModelSpec, context: int | None, batch: int | None) -> Load:
    positions = spec.max_position_embeddings
    found = Load(
        next(value for value in (context, plan.limits.context, positions) if value is not None),
        next(value for value in (batch, plan.limits.batch, 1) if value is not None),
    )
    if found.context < 1 or found.context > positions:
        raise PlanError(
            f"a context of `{found.context}` tokens, and the model has {positions} positions",
            f"give `--context` from 1 to {positions}",
        )
    if found.batch < 1:
        raise PlanError(
            f"a batch of `{found.batch}` sequences",
            "give `--batch` the sequences that are in work at once, 1 or more",
        )
    return found


def _alike(prepared: Prepared) -> list[tuple[tuple[int, ...], Cuts]]:
    """Ranks by their local sizes, with the cuts of the first of them."""
    mesh, cut = prepared.plan.mesh, set(prepared.assigned.cut)
    found: dict[Shape, tuple[list[int], Cuts]] = {}
    for rank in range(mesh.world):
        cuts = cuts_of(prepared.layout, cut, mesh, mesh.coords(rank))
        sizes = tuple(cut.size for cut in cuts.values())
        found.setdefault(sizes, ([], cuts))[0].append(rank)
    return [(tuple(ranks), cuts) for ranks, cuts in found.values()]


def _memory(
    prepared: Prepared, weights: int, cuts: Cuts, dispatch: DispatchPlan, load: Load
) -> Memory:
    spec, mesh, heads = prepared.spec, prepared.plan.mesh, cuts["KV"].size
    found = moments(spec, mesh, cuts, dispatch.prefill, load)
    return Memory(
        weights=weights,
        kv_cache=kv_bytes(spec, heads, load.context, load.sequences(mesh)),
        pages=pages_bytes(spec, heads, load, mesh),
        logits=logits_bytes(spec, load, mesh),
        activations=max(found.values()),
        moments=found,
    )


def _rows(
    prepared: Prepared, alike: tuple[Alike, ...], collectives: Iterable[str]
) -> tuple[Row, ...]:
    matched: dict[Rule, dict[str, list[Parameter]]] = {}
    for name, parameter in prepared.layout.parameters.items():
        kinds = matched.setdefault(prepared.assigned.rule_of[name], {})
        kinds.setdefault(generalised(name), []).append(parameter)
    return tuple(
        Row(
            rule,
            tuple(_kind(prepared, name, same, alike) for name, same in matched[rule].items()),
            _meets(rule, prepared, collectives),
        )
        for rule in prepared.plan.rules
    )


def _kind(prepared: Prepared, name: str, same: list[Parameter], alike: tuple[Alike, ...]) -> Kind:
    parameter = same[0]
    rule = prepared.assigned.rule_of[parameter.name]
    done = cut_by(rule.style, parameter, prepared.layout)
    shapes = [_shape(parameter, done, each.cuts) for each in alike]
    odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    dtype = prepared.index.tensors[parameter.sources[0].tensor].dtype
    held = 0 if parameter.tied_to else len(same)
    each = tuple(held * prod(shape) * DTYPE_BITS[dtype] // 8 for shape in shapes)
    return Kind(
        name,
        len(same),
        dtype,
        parameter.shape,
        shapes[0],
        None if odd is None else (alike[odd].ranks[0], shapes[odd]),
        each[0],
        each,
    )


def _shape(parameter: Parameter, done: set[str], cuts: Cuts) -> Shape:
    return tuple(
        sum(stop - start for start, stop in dim.ranges(*cuts[dim.logical][1:]))
        if dim.logical in done
        else dim.size
        for dim in parameter.dims
    )


def _meets(rule: Rule, prepared: Prepared, names: Iterable[str]) -> tuple[str, ...]:
    """Names of the collectives that a rule is the reason for, in the words of families/steps.py:
    `embed` and `head` of the first and last table, `attention` of what sums over heads, `moe.`"""
    layout, rule_of = prepared.layout, prepared.assigned.rule_of
    tables = [name for name in layout.parameters if _is_table(layout, name)]
    sums = [name for name, p in layout.parameters.items() if p.dims[-1].logical == "Q"]
    sums = [name for name in sums if len(layout.parameters[name].dims) > 1]
    experts = [name for name, p in layout.parameters.items() if "E" in {d.logical for d in p.dims}]
    reasons = {
        "embed": tables[:1],
        "head": tables[-1:],
        "attention": sums,
        "moe": experts,
    }
    mine = {word for word, found in reasons.items() if rule in {rule_of[name] for name in found}}
    return tuple(name for name in names if name.partition(".")[0] in mine)


def _is_table(layout: Layout, name: str) -> bool:
    dims = {dim.logical for dim in layout.parameters[name].dims}
    return any(layout.dims[logical].table for logical in dims if logical)
