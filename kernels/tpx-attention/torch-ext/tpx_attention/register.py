"""How the operations become known to torch.library, as torch.ops.<NAMESPACE>.<name>."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._ops import NAMESPACE

# Not torch.library.custom_op: its first call imports torch's compiler, which takes seconds, and
# each call costs the host twice as much.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operation(name: str, schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function as an operation of every device, without a gradient. schema: of
    arguments and results, in parentheses."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        return functools.wraps(run)(lambda *given, **named: overload(*given, **named))

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the shapes that the operation gives, for tensors without values."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=LIBRARY)
