"""What config.json, the headers and the plan prove before anything starts.

Each proof raises PlanError or CheckpointError with the values and the way out; nothing here reads
a tensor's data.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import PlanError
from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..index import CheckpointIndex
from ..mesh import Coords
from .checkpoint import check_checkpoint
from .cuts import assign, check_divides, cuts_of
from .dispatch import choose_dispatch
from .find import plans_for_world
from .limits import check_limits
from .match import at
from .types import Plan

FIRST = Coords(0, 0, 0, 0, 0)


class Proof(NamedTuple):
    """One proved statement and how many facts it was checked on."""

    text: str
    facts: int


def prove(
    plan: Plan, spec: ModelSpec, layout: Layout, index: CheckpointIndex, world: int
) -> list[Proof]:
    """All proofs in order; raises at the first that fails."""
    check_model(plan, spec)
    check_world(plan, world)
    proofs = [
        Proof(f"the mesh has two views of the same {world} ranks: {plan.mesh}", 1),
        Proof(*check_checkpoint(layout, index)),
    ]
    rule_of, cut = assign(plan, layout)
    _check_experts(plan, layout, set(cut))
    dispatch = choose_dispatch(plan)
    proofs += [
        Proof("every parameter has exactly one rule, and its style fits", len(rule_of)),
        Proof("parameters that share a dimension are cut alike", len(rule_of)),
        Proof("each axis can cut its dimensions", check_divides(plan, layout, cut)),
        Proof("the ranks' cuts tile each dimension", _check_tiling(plan, layout, set(cut))),
        Proof(
            f"the mesh allows dispatch {dispatch.prefill} to prefill, {dispatch.decode} to decode",
            1,
        ),
    ]
    return proofs + [Proof(*found) for found in check_limits(plan, spec, layout, index, cut)]


def check_model(plan: Plan, spec: ModelSpec) -> None:
    if plan.model != spec.model_type:
        raise PlanError(
            f"plan `{plan.path}` is for model `{plan.model}`, and `config.json` says "
            f"`{spec.model_type}`",
            f"use a plan for `{spec.model_type}`, or write `model: {spec.model_type}`",
        )


def check_world(plan: Plan, world: int) -> None:
    """Names the shipped plans for the world there is."""
    needs = plan.mesh.world
    if needs == world:
        return
    shipped = ", ".join(f"`{name}`" for name in plans_for_world(plan.model, world))
    there = f"there are {world}" if world != 1 else "there is 1"
    ranks = f"{needs} rank{'s' * (needs > 1)}"
    raise PlanError(
        f"plan `{plan.path}` is for {ranks} ({plan.mesh}), and {there}",
        f"start {ranks} (`tpx launch --nproc {needs}`), or use a plan for {world}: "
        + (shipped + " or `auto`" if shipped else "`auto`"),
    )


def _check_tiling(plan: Plan, layout: Layout, cut: set[str]) -> int:
    """Along its axis, each dimension's cuts follow each other from 0 to its size.

    Dim.ranges keeps this for every tensor: tests/test_plan_resolve.py holds it to that, element by
    element. Replicated units repeat a range, which is allowed where the layout says so.
    """
    mesh = plan.mesh
    facts = 0
    for name in cut:
        ends = {0}
        axis = layout.dims[name].axis
        for index in range(getattr(mesh, axis)):
            found = cuts_of(layout, {name}, mesh, FIRST._replace(**{axis: index}))[name]
            assert found.start in ends, f"{name=} {index=} {found=} leaves a gap"
            ends.add(found.stop)
            facts += 1
        assert max(ends) == layout.dims[name].size, f"{name=} {ends=}"
    return facts


def _check_experts(plan: Plan, layout: Layout, cut: set[str]) -> None:
    """Expert axes of the mesh must cut something: dispatch sends tokens to owners."""
    for axis in ("ep", "etp"):
        size = getattr(plan.mesh, axis)
        dims = [dim for dim in layout.dims.values() if dim.axis == axis]
        if size > 1 and not any(dim.name in cut for dim in dims):
            raise PlanError(
                f"{at(plan)} has {axis} {size}, and no rule cuts the experts",
                "use style `expert` for them, or `edp` in the mesh to hold them whole",
            )
