"""`--why-not`: which proof, memory or cost refused a mesh, a dispatch or a plan, in numbers."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple

from ..errors import PlanError, did_you_mean
from ..families.steps import Cut
from ..index import CheckpointIndex
from ..mesh import AXES, Mesh
from .auto import (
    Candidate,
    Search,
    cut_choices,
    divisors,
    experts_of,
    meshes,
    plan_of,
    weigh_plan,
)
from .cost import Memory
from .cuts import cuts_of
from .dispatch import choose_dispatch
from .find import read_plan
from .proofs import prove
from .reason import gb, ms, ranks, sequences, short_mesh, unit, variant
from .types import DISPATCHES, DispatchPlan, Plan, Rule


class Verdict(NamedTuple):
    """lines: sentences for people."""

    kind: Literal["chosen", "proof", "memory", "cost"]
    lines: tuple[str, ...]


class Asked(NamedTuple):
    """Sizes of axes, and a word of `dispatch` or None."""

    sizes: dict[str, int]
    word: str | None

    def __str__(self) -> str:
        words = [f"{axis} {size}" for axis, size in self.sizes.items()]
        return " and ".join([*words, *([f"dispatch {self.word}"] if self.word else [])])

    def has(self, mesh: Mesh) -> bool:
        return all(getattr(mesh, axis) == size for axis, size in self.sizes.items())

    def is_in(self, one: Candidate) -> bool:
        alike = self.word in (None, one.word) or one.dispatch == (self.word, self.word)
        return self.has(one.mesh) and alike


def why_not(search: Search, index: CheckpointIndex, text: str) -> Verdict:
    """text: `tp=4`, `ep=4,etp=2`, `dispatch=gather`, or a plan's name or file. Raises PlanError
    where it is none of these."""
    if "=" not in text:
        return _why_not_plan(search, index, text)
    asked = read_asked(text)
    fit, big = ([one for one in part if asked.is_in(one)] for part in (search.fit, search.big))
    if fit:
        return _against(search, fit[0], f"the best with {asked}")
    lawful = [mesh for mesh in meshes(search.work.world) if asked.has(mesh)]
    passing = [mesh for mesh in lawful if any(cut_choices(mesh, search.model.layout))]
    if big:
        return _too_big(search, big[0], f"the smallest with {asked}")
    if passing:
        return _refused_word(search, max(passing, key=lambda mesh: mesh.expert_size), asked)
    if lawful:
        return _refused_mesh(search, index, lawful[0], asked)
    return _no_mesh(search.work.world, asked)


def read_asked(text: str) -> Asked:
    """Raises PlanError."""
    sizes: dict[str, int] = {}
    word = None
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name not in (*AXES, "dispatch"):
            raise PlanError(
                f"`--why-not {text}` names no axis `{name}`",
                did_you_mean(name, (*AXES, "dispatch")),
            )
        if name in sizes or (name == "dispatch" and word):
            raise PlanError(f"`--why-not {text}` names `{name}` twice", "name it once")
        if name == "dispatch":
            if value not in DISPATCHES:
                raise PlanError(
                    f"`--why-not {text}` has no dispatch `{value}`",
                    did_you_mean(value, DISPATCHES),
                )
            word = value
        elif not value.isdecimal() or int(value) < 1:
            raise PlanError(
                f"`--why-not {text}` gives `{name}` the size `{value}`",
                f"give a whole number from 1 up: `{name}=2`",
            )
        else:
            sizes[name] = int(value)
    return Asked(sizes, word)


def _why_not_plan(search: Search, index: CheckpointIndex, name: str) -> Verdict:
    model, work = search.model, search.work
    plan = read_plan(name, model.spec.model_type)
    try:
        prove(plan, model.spec, model.layout, index, work.world)
    except PlanError as error:
        return _proof(f"`{plan.path}`", error)
    one = weigh_plan(model, plan, work)
    if work.memory is not None and one.memory.total > work.memory:
        return _too_big(search, one, f"`{plan.path}`")
    return _against(search, one, f"`{plan.path}`")


def _against(search: Search, one: Candidate, what: str) -> Verdict:
    best = search.fit[0]
    if _cuts(search, one) == _cuts(search, best) and one.dispatch == best.dispatch:
        return Verdict("chosen", (f"{_name(search, best)} is what was chosen",))
    name, ties = _name(search, one), one.key[:2] == best.key[:2]
    head = f"{what} ({name})" if what.startswith("`") else f"{name}, {what},"
    head += " passes the proofs and fits, and costs "
    head += "as much: traffic and fewer axes decide" if ties else "more"
    if one.cost is None or best.cost is None:
        mine, its = (sum(c.memory[:2]) for c in (best, one))
        lines = [
            f"{gb(its)} of weights and KV cache on its fullest rank, against {gb(mine)} of "
            f"{_name(search, best)}",
            f"{one.traffic:,.0f} bytes a token into the collectives of a layer, against "
            f"{best.traffic:,.0f}",
        ]
        return Verdict("cost", (head, *lines))
    more = one.cost.seconds - best.cost.seconds
    share = 100 * more / best.cost.seconds
    lines = [
        f"{ms(one.cost.seconds)} {unit(search.work)}, against {ms(best.cost.seconds)} of "
        f"{_name(search, best)}: {ms(more)} or {share:.1f}% more"
    ]
    for part, label in (("weights", "weights"), ("compute", "compute"), ("kv", "KV"),
                        ("links", "links")):  # fmt: skip
        here, there = getattr(one.cost, part), getattr(best.cost, part)
        sign = "+" if here >= there else "-"
        lines.append(f"  {label:<8} {ms(here):>9} against {ms(there):>9}"
                     f"  {sign}{ms(abs(here - there))}")  # fmt: skip
    return Verdict("cost", (head, *lines))


def _cuts(search: Search, one: Candidate) -> tuple[Mesh, dict[str, Cut]]:
    """What it does, whatever its rules are called."""
    return one.mesh, cuts_of(search.model.layout, one.cut, one.mesh, one.mesh.coords(0))


def _too_big(search: Search, one: Candidate, what: str) -> Verdict:
    limit = search.work.memory
    assert limit is not None
    return Verdict(
        "memory",
        (
            f"{_name(search, one)}, {what}, passes the proofs and does not fit: its fullest rank "
            f"needs {gb(one.memory.total)}, {gb(one.memory.total - limit)} more than {gb(limit)}",
            *held_lines(one.memory),
            f"for {sequences(search.work)} in all",
        ),
    )


def held_lines(held: Memory) -> list[str]:
    return [
        f"  weights  {gb(held.weights):>12}  exact",
        f"  KV cache {gb(held.kv):>12}  exact",
        f"  buffers  {gb(held.buffers):>12}  estimated",
    ]


def _refused_word(search: Search, mesh: Mesh, asked: Asked) -> Verdict:
    """The mesh is sound, and its candidates have no such dispatch."""
    assert asked.word is not None
    rule = Rule("experts", "expert", 0, dispatch=asked.word)
    try:
        choose_dispatch(Plan("auto", search.model.spec.model_type, mesh, (rule,)))
    except PlanError as error:
        return _proof(str(asked), error)
    raise AssertionError(f"{mesh=} takes {asked.word=}, and no candidate has it")


def _refused_mesh(search: Search, index: CheckpointIndex, mesh: Mesh, asked: Asked) -> Verdict:
    """Proves a plan of this mesh, to learn what fails."""
    spec, layout = search.model.spec, search.model.layout
    nothing = DispatchPlan("local", "local")
    cut = experts_of(layout)
    one = Candidate(mesh, cut, "auto", nothing, Memory(0, 0, 0), None, 0, 0)
    try:
        prove(plan_of(one, spec, layout), spec, layout, index, search.work.world)
    except PlanError as error:
        return _proof(str(asked), error)
    raise AssertionError(f"{mesh=} passes the proofs, and was not tried")


def _no_mesh(world: int, asked: Asked) -> Verdict:
    """The law that every mesh of these sizes breaks."""
    for axis, size in asked.sizes.items():
        if world % size:
            return Verdict(
                "proof", (f"no mesh has {asked}: {axis} {size} does not divide {ranks(world)}",)
            )
    sizes = divisors(world)
    for tp, ep, etp in product(sizes, sizes, sizes):
        views = dict(zip(AXES, (world // tp, tp, world // (ep * etp), ep, etp), strict=True))
        if world % (ep * etp) or asked.sizes.items() - views.items():
            continue
        try:
            Mesh(**views)
        except PlanError as error:
            return Verdict("proof", (f"no mesh has {asked}: {error.message}",))
    line = f"dp x tp and edp x ep x etp must each make {ranks(world)}"
    return Verdict("proof", (f"no mesh has {asked}: {line}",))


def _proof(what: str, error: PlanError) -> Verdict:
    proof = f"proof {error.code}" if error.code else "a proof"
    lines = [f"{what} is refused by {proof}: {error.message}"]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return Verdict("proof", tuple(lines))


def _name(search: Search, one: Candidate) -> str:
    more = variant(one, search.model.layout)
    return f"{short_mesh(one.mesh)} ({more})" if more else short_mesh(one.mesh)
