"""Which dispatch moves tokens to experts, and who owns which expert: from the mesh and one word."""

from __future__ import annotations

from ..errors import PlanError
from ..families.steps import DispatchName
from ..mesh import Mesh
from ..split import split
from .match import at
from .types import DispatchPlan, Plan, Rule

NAMED: dict[str, DispatchName] = {
    "replicated": "replicated",
    "gather": "gather",
    "all_to_all": "all_to_all",
}


def choose_dispatch(plan: Plan, prove: bool = True) -> DispatchPlan:
    """The dispatch for prefill and decode. Raises PlanError for a word the mesh does not allow.

    prove: False allows every word.
    """
    rule = _expert_rule(plan, prove)
    word = "auto" if rule is None else rule.dispatch
    if rule is not None and word != "auto":
        refused = _refused(plan.mesh, word) if prove else None
        if refused:
            code, reason = refused
            raise PlanError(
                f"{at(plan, rule)}: dispatch `{word}` does not fit the mesh: {reason}",
                "leave `dispatch` out, or say `auto`",
                code=code,
            )
        name = NAMED[word]
        return DispatchPlan(name, name)
    if plan.mesh.expert_size == 1:
        return DispatchPlan("local", "local")
    if inside_tp(plan.mesh):
        # One all-reduce of H values a token; all-to-all sends about twice that here, in four steps.
        return DispatchPlan("replicated", "replicated")
    # Prefill moves many tokens: all-to-all sends each to the ranks it needs and to no other. Decode
    # moves few, where latency counts: gather has no exchange of counts that the host must wait for,
    # and static shapes that a CUDA graph can hold.
    return DispatchPlan("all_to_all", "gather")


def _expert_rule(plan: Plan, prove: bool) -> Rule | None:
    """The rule of the experts; several for their parameters must say the same. None: no rule."""
    rules = [rule for rule in plan.rules if rule.style == "expert"]
    for rule in rules[1:] if prove else ():
        if (rule.dispatch, rule.uneven) != (rules[0].dispatch, rules[0].uneven):
            raise PlanError(
                f"{at(plan, rules[0], rule)}: two rules for experts differ in `dispatch` "
                "or `uneven`",
                "write one rule for all parameters of the experts",
                code="P408",
            )
    return rules[0] if rules else None


def inside_tp(mesh: Mesh) -> bool:
    """Whether the ranks of an expert group see the same tokens."""
    return mesh.tp % mesh.expert_size == 0


def _refused(mesh: Mesh, word: str) -> tuple[str, str] | None:
    """Why the mesh does not allow `word`: a code and a reason; None: it does."""
    size = mesh.expert_size
    if size == 1:
        return "P406", "ep and etp are 1, so each rank holds every expert and sends nothing"
    if word == "replicated" and not inside_tp(mesh):
        return "P307", (
            f"an expert group of {size} ranks spans {size // mesh.tp} tp groups, "
            "whose tokens differ"
        )
    if word == "gather" and inside_tp(mesh):
        return "P406", (
            f"the {size} ranks of an expert group lie in one tp group and see the same tokens"
        )
    if word == "all_to_all" and mesh.ep == 1:
        return "P406", "ep is 1, so every rank holds a part of every expert"
    return None


def owners(experts: int, ep: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """-> (owner_E, slot_E): for each expert, its place on the ep axis and among that rank's."""
    places = [
        (owner, slot)
        for owner, (start, stop) in enumerate(split(experts, ep))
        for slot in range(stop - start)
    ]
    return tuple(owner for owner, _ in places), tuple(slot for _, slot in places)
