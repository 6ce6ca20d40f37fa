"""What modules gave, in the order they ran, and the first that two runs do not share.

Looks through forward hooks; changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from .layers.attention import Attention
from .layers.embedding import VocabEmbedding, VocabHead
from .layers.norm import RMSNorm
from .moe.layer import MoELayer
from .trial import TOLERANCE, Fault

MODULES: dict[type[nn.Module], str] = {
    VocabEmbedding: "embedding",
    RMSNorm: "norm",
    Attention: "attention",
    MoELayer: "experts",
    VocabHead: "head",
}
LAYER = re.compile(r"\.(\d+)\.")
Error = tuple[float, bool]  # of a state, as Fault.error; and whether its router chose otherwise


class State(NamedTuple):
    """What a module gave, [rows, width]. top_k: of a router, whose state are its logits."""

    phase: str
    module: str
    name: str
    value: Tensor
    top_k: int = 0


@contextmanager
def watch(model: nn.Module, phase: str, states: list[State]) -> Iterator[None]:
    """Every forward within adds its states to the list."""

    names = {module: name for name, module in model.named_modules()}

    def gave(name: str, module: nn.Module, args: Any, out: Any) -> None:
        kind = MODULES[type(module)]
        if isinstance(module, MoELayer):  # it gives the norm that comes next, too
            x_TD, normed_TD = out
            states.append(State(phase, kind, name, x_TD - args[0]))
            states.append(State(phase, "norm", names[args[3]], normed_TD.clone()))
        else:
            residual = args[1] if isinstance(module, Attention) else 0
            states.append(State(phase, kind, name, out - residual))

    def routes(name: str, layer: MoELayer, args: Any) -> None:
        h_TD = args[2](args[0])  # `before`, whose own hook sees it
        logits = F.linear(h_TD, layer.router.weight, layer.router.bias)
        states.append(State(phase, "router", f"{name}.router", logits, layer.top_k))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            handles.append(module.register_forward_pre_hook(partial(routes, name)))
        if type(module) in MODULES:
            handles.append(module.register_forward_hook(partial(gave, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def errors_of(states: Sequence[State], expected: Sequence[Tensor]) -> list[Error]:
    return [error_of(state, value) for state, value in zip(states, expected, strict=True)]


def error_of(state: State, expected: Tensor) -> Error:
    """The largest difference as a share of the largest value; infinite where one is no number."""
    difference = float((state.value - expected).abs().max())
    largest = float(expected.abs().max())
    error = difference / largest if largest else (0.0 if difference == 0 else float("inf"))
    return (error if error == error else float("inf")), chooses_otherwise(state, expected)


def chooses_otherwise(state: State, expected: Tensor) -> bool:
    """Whether any token goes to other experts."""
    if not state.top_k:
        return False
    chosen = [
        logits.sort(descending=True, stable=True).indices[:, : state.top_k].sort().values
        for logits in (state.value, expected)
    ]
    return not bool((chosen[0] == chosen[1]).all())


def blame(states: Sequence[State], by_rank: Sequence[Sequence[Error]]) -> Fault | None:
    """The first module whose output leaves the tolerance on any rank: what it was given did not."""
    for place, state in enumerate(states):
        errors = [errors[place][0] for errors in by_rank]
        ranks = tuple(rank for rank, error in enumerate(errors) if not error <= TOLERANCE)
        if not ranks:
            continue
        tie = state.module == "experts" and any(errors[place - 1][1] for errors in by_rank)
        module, name = state.module, state.name
        if tie:
            module, name = states[place - 1].module, states[place - 1].name
        found = LAYER.search(name)
        layer = None if found is None else int(found[1])
        return Fault(state.phase, layer, module, name, ranks, max(errors), tie)
    return None
