"""Rules for a whole layout, written as a person would: one a module, siblings in braces."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..families.layout import Layout
from .patterns import generalised
from .styles import fitting
from .types import Rule


def units(layout: Layout) -> dict[str, list[str]]:
    """What a rule names -> its parameters: a module that holds parameters alone, else a parameter.

    Layers that differ by number are one: `model.layers.*.mlp.router`.
    """
    names = list(layout.parameters)
    inside = {name.rpartition(".")[0] for name in names}
    modules = {m for m in inside if not any(other.startswith(m + ".") for other in inside)}
    found: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        found.setdefault(generalised(module if module in modules else name), []).append(name)
    return found


def cutting_style(layout: Layout, parameters: Iterable[str]) -> str:
    """The style that cuts these parameters, `replicate` where none fits them all."""
    styles = [fitting(layout.parameters[name], layout) for name in parameters]
    return next(style for style in styles[0] if all(style in other for other in styles))


def rules_for(style_of: dict[str, str], make: Callable[[str, str], Rule]) -> tuple[Rule, ...]:
    """Rules for units with their styles; make(pattern, style) -> Rule."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for unit, style in style_of.items():
        parent, _, last = unit.rpartition(".")
        stem, _, ending = last.rpartition("_")
        key = (parent, ending, style) if stem else (parent, last, style)
        groups.setdefault(key, []).append(stem or last)
    return tuple(
        make(_pattern(parent, ending, stems), style)
        for (parent, ending, style), stems in groups.items()
    )


def _pattern(parent: str, ending: str, stems: list[str]) -> str:
    if len(stems) > 1:
        last = f"{{{','.join(stems)}}}_{ending}"
    else:
        last = stems[0] if stems[0] == ending else f"{stems[0]}_{ending}"
    return f"{parent}.{last}" if parent else last
