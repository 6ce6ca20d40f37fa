"""Chooses a plan: of all meshes that fit, the one whose fullest rank holds the fewest bytes.

Structure is exact (bytes from headers, collectives from the family); nothing here guesses a speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ..errors import PlanError
from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..families.steps import Collective, Cut, DispatchName
from ..index import CheckpointIndex
from ..mesh import AXES, Mesh
from .cuts import cuts_of, divides
from .dispatch import choose_dispatch
from .load import parse_plan
from .memory import Weights, kv_bytes
from .template import cutting_style, rules_for, units
from .types import Plan, Rule
from .write import to_yaml

Collectives = Callable[[ModelSpec, Mesh, Mapping[str, Cut], DispatchName], tuple[Collective, ...]]
MOST_CONTEXT = 8192  # tokens a sequence that the KV cache is weighed at


class Candidate(NamedTuple):
    """Ordered: the best is the smallest."""

    nbytes: int  # weights and KV cache of rank 0, the fullest
    traffic: float  # bytes a rank puts into the collectives of a layer, for each token of the job
    axes: tuple[int, ...]  # fewer and simpler axes first
    mesh: Mesh
    cut: frozenset[str]
    weights: int


def auto_plan(
    spec: ModelSpec,
    layout: Layout,
    index: CheckpointIndex,
    world: int,
    memory: int | None,
    collectives: Collectives,
) -> tuple[Plan, str]:
    """-> (the plan, its YAML text with the reason as a comment). memory: bytes a rank may hold.

    Raises PlanError where no plan fits `world` or `memory`, saying why.
    """
    if world < 1:
        raise PlanError(f"a plan for {world} ranks", "give a world of 1 or more")
    weights = Weights.of(layout, index)
    found = sorted(
        (
            _weigh(mesh, cut, spec, layout, weights, collectives)
            for mesh in meshes(world)
            for cut in _cuts(mesh, layout)
        ),
        key=lambda c: (c.nbytes, c.traffic, c.axes),
    )
    # mesh {tp: world, edp: world} with nothing but tables cut always fits, so `found` is not empty
    best = found[0]
    if memory is not None and best.nbytes > memory:
        raise PlanError(
            f"no plan for {world} rank{'s' * (world > 1)} fits {memory:,} bytes: the smallest, "
            f"{best.mesh}, needs {best.nbytes:,} on its fullest rank",
            "use more ranks",
        )
    text = to_yaml(_plan(best, spec, layout), _reason(found, spec, world))
    return parse_plan(text, "auto"), text


def meshes(world: int) -> Iterator[Mesh]:
    """Every mesh of that many ranks, by the two laws of mesh.py."""
    for tp in _divisors(world):
        for etp in _divisors(tp):
            for ep in _divisors(world // etp):
                inside, around = tp % (ep * etp) == 0, (ep * etp) % tp == 0
                if inside or around:
                    yield Mesh(world // tp, tp, world // (ep * etp), ep, etp)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _cuts(mesh: Mesh, layout: Layout) -> Iterator[frozenset[str]]:
    """What to cut on this mesh: one choice, or none where an expert axis does not fit.

    Tables are always cut. Heads are cut where tp divides them, and whole otherwise.
    """
    cut = {dim.name for dim in layout.dims.values() if divides(dim, getattr(mesh, dim.axis), True)}
    experts = {dim.name for dim in layout.dims.values() if dim.axis != "tp"}
    together = [group for group in layout.together if not cut.issuperset(group)]
    cut -= {name for group in together for name in group}
    if experts <= cut:
        yield frozenset(cut)


def _weigh(
    mesh: Mesh,
    cut: frozenset[str],
    spec: ModelSpec,
    layout: Layout,
    weights: Weights,
    collectives: Collectives,
) -> Candidate:
    cuts = cuts_of(layout, cut, mesh, mesh.coords(0))
    context = min(spec.max_position_embeddings, MOST_CONTEXT)
    held = weights.nbytes(cuts, layout)
    # One sequence a rank, dealt to the dp groups.
    cache = kv_bytes(spec, cuts["KV"].size, context, mesh.tp)
    dispatch = choose_dispatch(_bare(mesh, spec)).prefill
    steps = collectives(spec, mesh, cuts, dispatch)
    traffic = sum(s.nbytes for s in steps if s.per_layer and s.per_token) / mesh.dp
    sizes = [getattr(mesh, axis) for axis in AXES]
    return Candidate(
        held + cache,
        traffic,
        (sum(size > 1 for size in sizes), mesh.etp, mesh.dp),
        mesh,
        cut,
        held,
    )


def _bare(mesh: Mesh, spec: ModelSpec) -> Plan:
    return Plan("auto", spec.model_type, mesh, ())


def _plan(best: Candidate, spec: ModelSpec, layout: Layout) -> Plan:
    style_of: dict[str, str] = {}
    for unit, names in units(layout).items():
        dims = {d.logical for name in names for d in layout.parameters[name].dims if d.logical}
        sums = {layout.parameters[name].sums_over for name in names} - {""}
        whole = not (dims | sums) & best.cut
        style_of[unit] = "replicate" if whole else cutting_style(layout, names)
    asks = [dim for dim in layout.dims.values() if dim.uneven == "ask" and dim.name in best.cut]
    uneven = any(not divides(dim, getattr(best.mesh, dim.axis)) for dim in asks)

    def make(pattern: str, style: str) -> Rule:
        return Rule(pattern, style, 0, uneven=uneven and style == "expert")

    return Plan("auto", spec.model_type, best.mesh, rules_for(style_of, make))


def _reason(found: list[Candidate], spec: ModelSpec, world: int) -> str:
    """Comment lines: what was chosen, its bytes, and the next best mesh."""
    best, gb = found[0], 1e9
    context = min(spec.max_position_embeddings, MOST_CONTEXT)
    lines = [
        f"Chosen for {world} rank{'s' * (world > 1)} by memory: {best.mesh}.",
        f"The fullest rank holds {best.weights / gb:.3f} GB of weights and "
        f"{(best.nbytes - best.weights) / gb:.3f} GB of KV cache",
        f"(at one sequence of {context:,} tokens a rank).",
    ]
    if len(found) > 1:
        second = found[1]
        more = (second.nbytes - best.nbytes) / gb
        why = f"{more:.3f} GB more" if more >= 0.001 else "as many bytes, but more traffic or axes"
        lines.append(f"Next of {len(found)} that fit: {second.mesh}, {why}.")
    return "\n".join(lines)
