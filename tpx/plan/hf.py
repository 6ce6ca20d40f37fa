"""Imports a `tp_plan` dict in Hugging Face's form: module or parameter pattern -> style word.

Words are mapped where they mean the same here; others are errors. What the dict does not name is
replicated, as it is there, and said so.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import PlanError, or_list
from ..families.layout import Layout
from ..mesh import Mesh
from .patterns import expand, first_stray, generalised, matching
from .styles import fitting
from .template import cutting_style, rules_for, units
from .types import Plan, Rule

NAME = "tp_plan"
# Their word -> the styles it can mean here; which of them, the parameter decides.
MEANINGS = {
    "colwise": ("colwise",),
    "local_colwise": ("colwise",),
    "rowwise": ("rowwise",),
    "local_rowwise": ("rowwise", "colwise"),  # of a vector, such as sinks, its only dimension
    "colwise_rep": ("vocab",),  # gathers its output, as a vocabulary head does
    "colwise_gather_output": ("vocab",),
    "embedding_rowwise": ("vocab",),
    "vocab_parallel_rowwise": ("vocab",),
    "grouped_gemm": ("expert",),
    "ep_dispatch_experts": ("expert",),
    "replicate": ("replicate",),
    "ep_router": ("replicate",),
    "replicated_with_grad_allreduce": ("replicate",),
}
# Words that place nothing: they steer how a module runs, which here follows from the rules.
RUNS_ONLY = ("local_params", "gather")


def from_hf(
    tp_plan: Mapping[str, str],
    layout: Layout,
    model_type: str,
    world: int,
    ep_plan: Mapping[str, str] | None = None,
    dispatch: str = "auto",
) -> tuple[Plan, tuple[str, ...]]:
    """-> (a complete plan, notes on what it replicates). tp is `world`; ep too, if experts are cut.

    ep_plan: goes before tp_plan, as there. dispatch: of the experts' rule, where they are cut over
    several ranks. Raises PlanError for an unknown word and for a name that the model does not have.
    """
    style_of = _styles(tp_plan, layout) | _styles(ep_plan or {}, layout)
    named = units(layout)
    of_unit = {unit: _one_style(unit, names, style_of) for unit, names in named.items()}
    experts = "expert" in of_unit.values()
    mesh = Mesh(tp=world, ep=world) if experts else Mesh(tp=world, edp=world)
    word = dispatch if world > 1 else "auto"
    rules = rules_for(
        {unit: style or "replicate" for unit, style in of_unit.items()},
        lambda pattern, style: Rule(pattern, style, 0, word if style == "expert" else "auto"),
    )
    silent = {
        unit: "replicate"
        for unit, style in of_unit.items()
        if style is None and cutting_style(layout, named[unit]) != "replicate"
    }
    left = ", ".join(rule.pattern for rule in rules_for(silent, lambda p, s: Rule(p, s, 0)))
    notes = (f"{NAME} does not name {left}: every rank holds it whole",) if silent else ()
    return Plan(NAME, model_type, mesh, rules), notes if world > 1 else ()


def _styles(tp_plan: Mapping[str, str], layout: Layout) -> dict[str, str]:
    """Of each parameter that the dict names. Two words for one parameter are an error."""
    found: dict[str, tuple[str, str]] = {}
    for key, word in tp_plan.items():
        for name in _parameters(key, layout):
            if word in RUNS_ONLY:
                continue
            style = _style(key, word, layout, name)
            first, before = found.setdefault(name, (key, style))
            if before != style:
                raise PlanError(
                    f"plan `{NAME}`: `{first}` and `{key}` give `{generalised(name)}` two styles",
                    "delete one of the two",
                )
    return {name: style for name, (_, style) in found.items()}


def _one_style(unit: str, names: list[str], style_of: dict[str, str]) -> str | None:
    """The style of all parameters of a unit; None: not named. Part of them is an error."""
    styles = {style_of.get(name) for name in names}
    if len(styles) > 1:
        inside = next(name for name in names if name in style_of)
        outside = next(name for name in names if style_of.get(name) != style_of[inside])
        raise PlanError(
            f"plan `{NAME}` cuts a part of `{unit}`: `{inside}` is `{style_of[inside]}`, and "
            f"`{outside}` is not",
            f"name `{unit}` as a whole: its parameters, and all layers, are cut alike",
        )
    return styles.pop()


def _parameters(key: object, layout: Layout) -> list[str]:
    """The parameters that a key names; the base model's prefix may be left out, as there."""
    if not isinstance(key, str):
        raise PlanError(f"plan `{NAME}`: key `{key}` is not a pattern", "write `'lm_head': ...`")
    names = list(layout.parameters)
    for pattern in (key, f"model.{key}"):
        try:
            expand(pattern)
        except ValueError as error:
            raise PlanError(f"plan `{NAME}`: pattern `{key}` cannot be read: {error}") from None
        # An expert weight is named without the endings of its packed pieces.
        found = matching(pattern, names) or [
            name for name in names if _starts(pattern, generalised(name))
        ]
        if found:
            return found
    kept, stray, choices = first_stray(expand(key)[0], names)
    raise PlanError(
        f"plan `{NAME}`: `{key}` matches nothing: "
        + (f"`{kept}` has no `{stray}`" if kept else f"there is no `{stray}`"),
        f"use {or_list(choices)}" if choices else None,
    )


def _starts(pattern: str, name: str) -> bool:
    return name.startswith((f"{pattern}_blocks", f"{pattern}_scales"))


def _style(key: str, word: object, layout: Layout, name: str) -> str:
    if not isinstance(word, str) or word not in MEANINGS:
        raise PlanError(
            f"plan `{NAME}`: `{key}` has style `{word}`, which has no equal here",
            f"use {or_list(MEANINGS)}",
        )
    fits = fitting(layout.parameters[name], layout)
    style = next((meaning for meaning in MEANINGS[word] if meaning in fits), None)
    if style is None:
        theirs = [w for w, meanings in MEANINGS.items() if meanings[0] in fits[:-1]]
        theirs.append("replicate")
        raise PlanError(
            f"plan `{NAME}`: style `{word}` does not fit `{generalised(name)}`",
            f"use {or_list(theirs)}",
        )
    return style
