"""What config.json, the headers and the plan prove before anything starts: C1 to C14.

Each proof raises PlanError or CheckpointError with a code, the values and the way out; nothing here
reads a tensor's data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..errors import PlanError
from ..families.family import Family
from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..families.steps import Collective, DispatchName
from ..index import CheckpointIndex
from ..mesh import GROUPS, Mesh
from .checkpoint import check_checkpoint
from .codes import PROOFS
from .cuts import Assigned, assign, check_divides
from .dispatch import choose_dispatch
from .find import plans_for_world
from .flow import check_flow
from .held import Held, Sent, cuts_by_rank, hold
from .limits import check_limits
from .match import at
from .tiling import check_blocks, check_tiling
from .types import MOST_RANKS, Plan


class Proof(NamedTuple):
    """One proved statement and how many facts it was checked on. name: C1 to C14; codes: what it
    is refused with."""

    text: str
    facts: int
    name: str = ""
    codes: tuple[str, ...] = ()


def prove(
    plan: Plan,
    spec: ModelSpec,
    layout: Layout,
    index: CheckpointIndex,
    world: int,
    family: Family | None = None,
    assigned: Assigned | None = None,
) -> list[Proof]:
    """All proofs, by name; raises at the first that fails.

    family: whose flow is typed; None: a layout alone. assigned: what assign() gave, if known.
    """
    check_model(plan, spec)
    check_world(plan, world)
    block = one_block(plan)
    tensors = check_checkpoint(layout, index)
    assigned = assigned or assign(plan, layout)
    _check_experts(plan, layout, set(assigned.cut))
    dispatch = choose_dispatch(plan)
    divided = check_divides(plan, layout, assigned.cut)
    blocks = check_blocks(plan, layout, cuts_by_rank(layout, assigned.cut, block.mesh))
    held = hold(block, layout, index, assigned)
    parameters, rules = len(layout.parameters), len(plan.rules)
    mesh = plan.mesh
    found = [
        _proof("C1", "every tensor is used, and every parameter has one rule", parameters),
        _proof("C2", "every rule matches parameters that its style fits", rules),
        _proof("C3", *tensors),
        _proof("C4", "the ranks' shards tile every parameter", check_tiling(held)),
        _proof("C5", "every cut falls between blocks", blocks),
        _proof("C6", "each axis can cut its dimensions", divided),
        _proof("C9", f"the mesh has two views of the same ranks: {mesh}", check_groups(block)),
        *_flow_proofs(held, family, spec, dispatch),
    ]
    tied = check_tied(held)
    if tied:
        found.append(_proof("C10", "tied parameters are cut alike", tied))
    for name, text, facts in check_limits(plan, spec, layout, index, assigned):
        found.append(_proof(name, text, facts))
    return sorted(found, key=lambda proof: int(proof.name[1:]))


def _proof(name: str, text: str, facts: int) -> Proof:
    return Proof(text, facts, name, PROOFS[name])


def _flow_proofs(
    held: Held, family: Family | None, spec: ModelSpec, dispatch: Iterable[DispatchName]
) -> list[Proof]:
    if family is None:
        return []
    values = heads = calls = uniform = 0
    names = tuple(dict.fromkeys(dispatch))
    for name in names:
        sent = Sent(name, _sent(held, family, spec, name))
        outside = {c.group for c in sent.collectives[0]} & {"dp", "edp", "world"}
        assert not outside, f"{outside=} join blocks, and flow is typed inside one"
        uniform += check_uniform(held.plan, sent.collectives)
        typed, compared = check_flow(held, family.flow(spec, name), sent)
        values, heads, calls = values + typed, heads + compared, calls + len(sent.collectives[0])
    way = " and ".join(f"`{name}`" for name in names)
    return [
        _proof("C7", "each rank's query heads are the groups of its key heads", heads),
        _proof("C8", f"every value is typed, and each sum added once, by dispatch {way}", values),
        _proof("C13", "every collective belongs to a step, and no step lacks one", calls),
        _proof("C14", "all ranks call the same collectives in the same order", uniform),
    ]


def _sent(
    held: Held, family: Family, spec: ModelSpec, name: DispatchName
) -> list[tuple[Collective, ...]]:
    """By rank; ranks whose cuts have the same sizes send alike."""
    made: dict[tuple[tuple[str | None, int], ...], tuple[Collective, ...]] = {}
    found = []
    for cuts in held.cuts:
        key = tuple((cut.axis, cut.size) for cut in cuts.values())
        if key not in made:
            made[key] = family.collectives(spec, held.plan.mesh, cuts, name)
        found.append(made[key])
    return found


def check_uniform(plan: Plan, sent: Sequence[tuple[Collective, ...]]) -> int:
    """Every rank calls the same collectives over the same groups, whatever it holds."""
    first = [(c.name, c.op, c.group) for c in sent[0]]
    for rank, mine in enumerate(sent):
        if mine is not sent[0] and [(c.name, c.op, c.group) for c in mine] != first:
            raise PlanError(
                f"plan `{plan.path}`: ranks 0 and {rank} call different collectives",
                "no plan is at fault: the family's list of collectives is",
                code="P317",
            )
    return len(sent)


def check_groups(plan: Plan) -> int:
    """Each group has its size, and each rank one place in one group of each name; -> groups."""
    facts = 0
    for name in GROUPS:
        groups = plan.mesh.groups(name)
        if {len(group) for group in groups} != {plan.mesh.size(name)}:
            raise PlanError(
                f"plan `{plan.path}`: groups `{name}` of {plan.mesh} have unequal sizes",
                "no plan is at fault: the mesh's groups are",
                code="P318",
            )
        facts += len(groups)
    return facts


def check_tied(held: Held) -> int:
    """A tied parameter is cut as the one that it shares storage with; -> how many are tied."""
    tied = {n: p.tied_to for n, p in held.layout.parameters.items() if p.tied_to and n in held.of}
    for name, other in tied.items():
        for rank, shards in enumerate(held.shards):
            assert other is not None
            if shards[name].ranges != shards[other].ranges:
                raise PlanError(
                    f"plan `{held.plan.path}`: rank {rank} cuts `{name}` unlike `{other}`, whose "
                    "storage it shares",
                    "give both the same style",
                    code="P315",
                )
    return len(tied)


def check_model(plan: Plan, spec: ModelSpec) -> None:
    if plan.model != spec.model_type:
        raise PlanError(
            f"plan `{plan.path}` is for model `{plan.model}`, and `config.json` says "
            f"`{spec.model_type}`",
            f"use a plan for `{spec.model_type}`, or write `model: {spec.model_type}`",
            code="P109",
        )


def one_block(plan: Plan) -> Plan:
    """The plan on the fewest ranks that no collective of a forward leaves.

    tp and expert groups lie inside one another, so a mesh is made of equal blocks of the larger of
    the two; they differ in whose tokens they see, and only dp and edp groups join them.
    """
    mesh = plan.mesh
    size = max(mesh.tp, mesh.expert_size)
    inner = Mesh(size // mesh.tp, mesh.tp, size // mesh.expert_size, mesh.ep, mesh.etp)
    return replace(plan, mesh=inner)


def check_world(plan: Plan, world: int) -> None:
    """Names the shipped plans for the world there is."""
    needs = plan.mesh.world
    if needs > MOST_RANKS:
        raise PlanError(
            f"plan `{plan.path}` is for {needs:,} ranks, more than {MOST_RANKS:,}",
            "use smaller axes",
            code="P419",
        )
    if needs == world:
        return
    shipped = ", ".join(f"`{name}`" for name in plans_for_world(plan.model, world))
    there = f"there are {world}" if world != 1 else "there is 1"
    ranks = f"{needs} rank{'s' * (needs > 1)}"
    raise PlanError(
        f"plan `{plan.path}` is for {ranks} ({plan.mesh}), and {there}",
        f"start {ranks} (`tpx launch --nproc {needs}`), or use a plan for {world}: "
        + (shipped + " or `auto`" if shipped else "`auto`"),
        code="P308",
    )


def _check_experts(plan: Plan, layout: Layout, cut: set[str]) -> None:
    """Expert axes of the mesh must cut something: dispatch sends tokens to owners."""
    for axis in ("ep", "etp"):
        size = getattr(plan.mesh, axis)
        dims = [dim for dim in layout.dims.values() if dim.axis == axis]
        if size > 1 and not any(dim.name in cut for dim in dims):
            raise PlanError(
                f"{at(plan)} has {axis} {size}, and no rule cuts the experts",
                "use style `expert` for them, or `edp` in the mesh to hold them whole",
                code="P302",
            )
