"""Chooses a plan: tries every mesh, cut and dispatch that the proofs allow, and takes the fastest.

Where the device's speeds are not known, the one whose fullest rank holds the fewest bytes. What
each costs is cost.py's; nothing here knows a figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from ..errors import PlanError
from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..families.steps import Cut
from ..mesh import AXES, Mesh
from .cost import Cost, Memory, Model, cost, memory
from .cuts import assign, cuts_of, divides
from .dispatch import choose_dispatch, inside_tp
from .template import cutting_style, rules_for, units
from .types import DispatchPlan, Plan, Rule
from .wants import Wants, Work


class Candidate(NamedTuple):
    """A plan and what it costs. cut: the logical dimensions that are cut; word: of `dispatch`.
    cost: None where the device's speeds are not known; links: its last part, known or not.
    traffic: bytes a rank puts into a layer's collectives for each token of the job."""

    mesh: Mesh
    cut: frozenset[str]
    word: str
    dispatch: DispatchPlan
    memory: Memory
    cost: Cost | None
    links: float
    traffic: float

    @property
    def key(self) -> tuple[object, ...]:
        """The best is the smallest: time to a tenth of a nanosecond, or bytes where the speeds are
        not known; then bytes, the plain word, traffic, fewer and simpler axes."""
        held = self.memory.weights + self.memory.kv
        seconds = round(self.cost.seconds, 10) if self.cost else 0.0
        sizes = [getattr(self.mesh, axis) for axis in AXES]
        simple = sum(size > 1 for size in sizes), self.mesh.etp, self.mesh.dp
        return seconds, held, self.word != "auto", self.traffic, simple, sorted(self.cut)


class Search(NamedTuple):
    """fit: those that fit the memory, the best first. big: the others, the smallest first."""

    model: Model
    work: Work
    fit: list[Candidate]
    big: list[Candidate]

    def best_of_each_mesh(self) -> list[Candidate]:
        found: dict[Mesh, Candidate] = {}
        for one in self.fit:
            found.setdefault(one.mesh, one)
        return list(found.values())


def search(model: Model, wants: Wants) -> Search:
    """Every candidate, weighed. Raises PlanError where none fits."""
    work = Work.of(wants, model.spec)
    found = sorted(candidates(model, work), key=lambda one: one.key)
    limit = work.memory
    fit = [one for one in found if limit is None or one.memory.total <= limit]
    big = [one for one in found if limit is not None and one.memory.total > limit]
    big.sort(key=lambda one: one.memory.total)
    if not fit:
        # mesh {tp: world, edp: world} with nothing but tables cut always passes: `big` has one
        assert limit is not None
        least, ranks = big[0], f"{work.world} rank{'s' * (work.world > 1)}"
        raise PlanError(
            f"no plan for {ranks} fits {limit:,} bytes: the smallest, {least.mesh}, needs "
            f"{least.memory.total:,} on its fullest rank, {least.memory.weights:,} of them weights",
            "use more ranks, or a smaller `--context` or `--batch`",
        )
    return Search(model, work, fit, big)


def candidates(model: Model, work: Work) -> Iterator[Candidate]:
    for mesh in meshes(work.world):
        words = list(dispatch_words(mesh, model.spec.model_type))
        for cut in cut_choices(mesh, model.layout):
            cuts = cuts_of(model.layout, cut, mesh, mesh.coords(0))
            for word, dispatch in words:
                yield weigh(model, mesh, cut, cuts, word, dispatch, work)


def weigh(
    model: Model,
    mesh: Mesh,
    cut: frozenset[str],
    cuts: dict[str, Cut],
    word: str,
    dispatch: DispatchPlan,
    work: Work,
) -> Candidate:
    steps = model.collectives(model.spec, mesh, cuts, dispatch.prefill)
    traffic = sum(s.nbytes for s in steps if s.per_layer and s.per_token) / mesh.dp
    held = memory(model, mesh, cuts, dispatch, work)
    spent = cost(model, mesh, cuts, dispatch, work)
    known = None if work.device.read is None else spent
    return Candidate(mesh, cut, word, dispatch, held, known, spent.links, traffic)


def weigh_plan(model: Model, plan: Plan, work: Work) -> Candidate:
    """A plan that passed the proofs."""
    cut = frozenset(assign(plan, model.layout).cut)
    cuts = cuts_of(model.layout, cut, plan.mesh, plan.mesh.coords(0))
    word = next((rule.dispatch for rule in plan.rules if rule.style == "expert"), "auto")
    return weigh(model, plan.mesh, cut, cuts, word, choose_dispatch(plan), work)


def meshes(world: int) -> Iterator[Mesh]:
    """Every mesh of that many ranks, by the two laws of mesh.py."""
    for tp in divisors(world):
        for etp in divisors(tp):
            for ep in divisors(world // etp):
                inside, around = tp % (ep * etp) == 0, (ep * etp) % tp == 0
                if inside or around:
                    yield Mesh(world // tp, tp, world // (ep * etp), ep, etp)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def cut_choices(mesh: Mesh, layout: Layout) -> Iterator[frozenset[str]]:
    """What to cut on this mesh; nothing where an expert axis does not fit.

    Experts are always cut. Heads and each table are cut or whole; over one rank there is no choice,
    and over several something is cut, or they would all do the same.
    """
    fits = {dim.name for dim in layout.dims.values() if divides(dim, getattr(mesh, dim.axis), True)}
    experts = experts_of(layout)
    if not experts <= fits:
        return
    groups = [frozenset(group) for group in layout.together if fits.issuperset(group)]
    grouped = {name for group in layout.together for name in group}
    free = [*groups, *(frozenset({name}) for name in sorted(fits - experts - grouped))]
    fewest = len(free) if mesh.tp == 1 else int(mesh.expert_size == 1)
    for count in range(len(free), fewest - 1, -1):
        for chosen in combinations(free, count):
            yield frozenset(experts.union(*chosen))


def experts_of(layout: Layout) -> frozenset[str]:
    return frozenset(dim.name for dim in layout.dims.values() if dim.axis != "tp")


def dispatch_words(mesh: Mesh, model_type: str) -> Iterator[tuple[str, DispatchPlan]]:
    """The words that differ on this mesh, and what they mean."""
    words = ["auto"]
    if mesh.expert_size > 1:
        words += [] if inside_tp(mesh) else ["gather"]
        words += ["all_to_all"] if mesh.ep > 1 else []
    for word in words:
        rule = Rule("experts", "expert", 0, dispatch=word)
        yield word, choose_dispatch(Plan("auto", model_type, mesh, (rule,)))


def plan_of(one: Candidate, spec: ModelSpec, layout: Layout) -> Plan:
    """Its rules, one a module."""
    style_of: dict[str, str] = {}
    for unit, names in units(layout).items():
        dims = {d.logical for name in names for d in layout.parameters[name].dims if d.logical}
        sums = {layout.parameters[name].sums_over for name in names} - {""}
        whole = not (dims | sums) & one.cut
        style_of[unit] = "replicate" if whole else cutting_style(layout, names)
    asks = [dim for dim in layout.dims.values() if dim.uneven == "ask" and dim.name in one.cut]
    uneven = any(not divides(dim, getattr(one.mesh, dim.axis)) for dim in asks)

    def make(pattern: str, style: str) -> Rule:
        if style != "expert":
            return Rule(pattern, style, 0)
        return Rule(pattern, style, 0, dispatch=one.word, uneven=uneven)

    return Plan("auto", spec.model_type, one.mesh, rules_for(style_of, make))
