"""Plan -> Hugging Face's form, where transformers 5.23 can say it; else every reason why not.

Its styles place tensors one by one, on one axis of tp_size ranks that see the same tokens; experts
are dealt over those same ranks or over none.
"""

from __future__ import annotations

from ..errors import PlanError
from ..families.layout import Layout
from .cuts import Assigned, assign
from .hf_form import DISPATCH, HfForm
from .patterns import generalised
from .template import cutting_style, units
from .types import Plan

HEAD = "lm_head"  # what every causal model of theirs calls its output head
PACKED = ("_blocks", "_scales")  # endings of a packed weight's pieces, which they do not name
WORDS = {"colwise": "colwise", "rowwise": "rowwise", "replicate": "replicate"}


def to_hf(plan: Plan, layout: Layout) -> tuple[HfForm, tuple[str, ...]]:
    """-> (the form, notes on what stays behind). Raises PlanError with all that it cannot say."""
    assigned = assign(plan, layout)
    reasons = cannot_say(plan, layout, assigned)
    if reasons:
        raise PlanError(
            f"plan `{plan.path}` has no equal in Hugging Face's form: {'; '.join(reasons)}",
            "transformers 5.23 cuts over one axis: use a plan whose mesh is tp, or tp and an ep of "
            "the same size",
        )
    dealt = plan.mesh.ep > 1 and "E" in assigned.cut
    tp_plan: dict[str, str] = {}
    ep_plan: dict[str, str] = {}
    for unit, names in units(layout).items():
        style = assigned.rule_of[names[0]].style
        if style == "expert" and (dealt or plan.mesh.world == 1):
            ep_plan |= dict.fromkeys(map(unpacked, names), "grouped_gemm")
            ep_plan[unit] = "ep_dispatch_experts"
        elif cutting_style(layout, names) != "replicate":
            tp_plan |= dense_words(unit, "replicate" if style == "expert" else style, names)
    word = assigned.cut["E"].dispatch if dealt else "auto"
    theirs = next(name for name, ours in DISPATCH.items() if ours == word)
    ep_size = plan.mesh.ep if ep_plan else None
    return HfForm(tp_plan, ep_plan, plan.mesh.tp, ep_size, theirs), notes_on(plan, layout, assigned)


def cannot_say(plan: Plan, layout: Layout, assigned: Assigned) -> list[str]:
    """Each with the plan's numbers."""
    mesh, cut = plan.mesh, assigned.cut
    found = []
    if mesh.dp > 1:
        found.append(
            f"dp {mesh.dp} (ranks that serve different tokens hold whole copies there only under "
            "FSDP, which shards them)"
        )
    if mesh.etp > 1 and "I" in cut:
        uneven = " unevenly, on MXFP4 blocks" if cut["I"].uneven else ""
        found.append(f"etp {mesh.etp} (no style cuts the inside of an interleaved expert{uneven})")
    if "E" in cut and mesh.ep > 1 and mesh.ep != mesh.tp:
        found.append(f"ep {mesh.ep} beside tp {mesh.tp} (experts go over all ranks of tp)")
    if "E" in cut and cut["E"].dispatch not in DISPATCH.values():
        found.append(f"dispatch `{cut['E'].dispatch}` (all-reduce and all-to-all are all it has)")
    if "KV" in cut and mesh.tp > layout.dims["KV"].units:
        found.append(
            f"{layout.dims['KV'].config_key} {layout.dims['KV'].units} over tp {mesh.tp} (a key "
            "head that several ranks hold)"
        )
    return found


def dense_words(unit: str, style: str, names: list[str]) -> dict[str, str]:
    if style == "vocab":
        word = "colwise_gather_output" if unit == HEAD else "embedding_rowwise"
        return {unit: word}
    found = {unit: WORDS[style]}
    if style != "replicate" and [unit] == list(dict.fromkeys(map(generalised, names))):
        # A parameter that no module of its own holds: its owner must run on plain tensors.
        found[unit.rpartition(".")[0]] = "local_params"
    return found


def unpacked(name: str) -> str:
    name = generalised(name)
    return next((name.removesuffix(end) for end in PACKED if name.endswith(end)), name)


def notes_on(plan: Plan, layout: Layout, assigned: Assigned) -> tuple[str, ...]:
    found = []
    limits = plan.limits
    kept = ("memory", "context", "batch", "max_replicated")
    said = [key for key in kept if getattr(limits, key) is not None]
    if said:
        found.append(f"limits stay behind, since the form has none: {', '.join(said)}")
    for name in assigned.cut:
        dim = layout.dims[name]
        if dim.table and dim.units % plan.mesh.tp:
            found.append(
                f"{dim.config_key} {dim.units} over tp {plan.mesh.tp}: transformers gives the last "
                "ranks fewer rows, tpx deals them evenly"
            )
    return tuple(dict.fromkeys(found))
