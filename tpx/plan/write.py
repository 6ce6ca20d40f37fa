"""Plan -> YAML text that loads to the same plan."""

from __future__ import annotations

from ..mesh import AXES
from .types import Plan, Rule


def to_yaml(plan: Plan, comment: str = "") -> str:
    """`comment`: lines for the head of the file, without `#`."""
    sizes = {axis: getattr(plan.mesh, axis) for axis in AXES}
    mesh = ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size > 1)
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += ["tpx: 1", f"model: {plan.model}", f"mesh: {{{mesh or 'tp: 1'}}}", "modules:"]
    width = max(len(rule.pattern) for rule in plan.rules) + 1
    lines += [f"  {rule.pattern + ':':<{width}} {_value(rule)}" for rule in plan.rules]
    limits = plan.limits
    said = {key: getattr(limits, key) for key in ("memory", "context", "batch")}
    if limits.max_replicated is not None:
        said["max_replicated"] = f"{limits.max_replicated:f}".rstrip("0").rstrip(".")
    kept = ", ".join(f"{key}: {value}" for key, value in said.items() if value is not None)
    if kept:
        lines.append(f"limits: {{{kept}}}")
    return "\n".join(lines) + "\n"


def _value(rule: Rule) -> str:
    options = [f"style: {rule.style}"]
    if rule.dispatch != "auto":
        options.append(f"dispatch: {rule.dispatch}")
    if rule.uneven:
        options.append("uneven: true")
    return rule.style if len(options) == 1 else f"{{{', '.join(options)}}}"
