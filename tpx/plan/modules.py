"""The modules that people talk about: parameters that differ by layer, or by weight and bias."""

from __future__ import annotations

from ..families.layout import Layout, Parameter
from .patterns import generalised

Modules = dict[str, dict[str, list[Parameter]]]


def modules_of(layout: Layout) -> Modules:
    """Module -> parameter -> its copies in the layers; names have `*` for numbers.

    A parameter that lies beside modules (attention's sinks) is a module of its own. One that shares
    another's storage belongs to none.
    """
    held = [p for p in layout.parameters.values() if p.tied_to is None]
    names = {generalised(p.name) for p in held}
    owners = {name.rpartition(".")[0] for name in names}
    found: Modules = {}
    for parameter in held:
        name = generalised(parameter.name)
        owner = name.rpartition(".")[0]
        beside = any(other.startswith(owner + ".") for other in owners)
        module = found.setdefault(name if beside else owner, {})
        module.setdefault(name, []).append(parameter)
    return found
