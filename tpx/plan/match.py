"""Which rule each parameter has: exactly one, and every rule has a parameter that it fits."""

from __future__ import annotations

from ..errors import PlanError, did_you_mean, or_list
from ..families.layout import Layout
from .patterns import Pattern, expand, first_stray, generalised
from .styles import cut_by, fitting
from .types import Plan, Rule


def at(plan: Plan, *rules: Rule) -> str:
    """`plan `x`, line 3` or `plan `x`, lines 3 and 7`, to start a message with."""
    lines = sorted({rule.line for rule in rules if rule.line})
    if not lines:
        return f"plan `{plan.path}`"
    return f"plan `{plan.path}`, line{'s' * (len(lines) > 1)} {' and '.join(map(str, lines))}"


def match_rules(plan: Plan, layout: Layout, prove: bool = True) -> dict[str, Rule]:
    """The rule of each parameter, in the layout's order. Raises PlanError.

    prove: False takes the first rule of each parameter, whatever its style.
    """
    found: dict[str, Rule] = {}
    for rule in plan.rules:
        for name in _matched(plan, rule, layout, prove):
            if name in found and prove:
                raise _two_rules(plan, name, found[name], rule)
            found.setdefault(name, rule)
    for name in layout.parameters:
        if name not in found:
            raise _no_rule(plan, name, layout, found)
    for name in layout.parameters if prove else ():
        _check_style(plan, name, found[name], layout)
    return {name: found[name] for name in layout.parameters}


def _matched(plan: Plan, rule: Rule, layout: Layout, prove: bool) -> list[str]:
    """The parameters of a rule, each once. Every alternative of the pattern must match one."""
    found: dict[str, None] = {}
    for text in expand(rule.pattern):
        pattern = Pattern(text)
        matched = [name for name in layout.parameters if pattern.matches(name)]
        if not matched and prove:
            kept, stray, choices = first_stray(text, layout.parameters)
            inside = f"`{kept}` has no `{stray}`" if kept else f"there is no `{stray}`"
            raise PlanError(
                f"{at(plan, rule)}: `{rule.pattern}` matches nothing: {inside}",
                did_you_mean(stray, choices) if choices else f"nothing lies under `{kept}`",
                code="P402",
            )
        found |= dict.fromkeys(matched)
    return list(found)


def _two_rules(plan: Plan, name: str, first: Rule, second: Rule) -> PlanError:
    return PlanError(
        f"{at(plan, first, second)}: both `{first.pattern}` and `{second.pattern}` match `{name}`",
        "change one of them: exactly one rule may match a parameter, and order has no meaning",
        code="P403",
    )


def _no_rule(plan: Plan, name: str, layout: Layout, found: dict[str, Rule]) -> PlanError:
    """Names all layers at once where none of them has a rule."""
    alike = [other for other in layout.parameters if generalised(other) == generalised(name)]
    shown = name if any(other in found for other in alike) else generalised(name)
    styles = fitting(layout.parameters[name], layout)
    return PlanError(
        f"plan `{plan.path}` has no rule for `{shown}`",
        f"add a line `{shown}: STYLE` with style {or_list(styles)}",
        code="P101",
    )


def _check_style(plan: Plan, name: str, rule: Rule, layout: Layout) -> None:
    parameter = layout.parameters[name]
    if rule.style != "replicate" and not cut_by(rule.style, parameter, layout):
        styles = fitting(parameter, layout)
        raise PlanError(
            f"{at(plan, rule)}: style `{rule.style}` does not fit `{name}`",
            f"use {or_list(styles)}",
            code="P404",
        )
