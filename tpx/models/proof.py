"""Tries the chosen kernels on the device, before a model is loaded: one that is wrong does not run.

What a package's `self_test` measures is compared with its own BOUND. Kernels without one, of other
publishers, are taken at their word. How experts are unpacked is tried, too, while there is memory.
What was found is kept on disk, see verdicts.py. What the trials launch is compiled before, see
ahead.py.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..comm import Group
from ..kernels.choice import Choice
from ..kernels.compiling import Failure, Noted
from ..kernels.loaded import Loaded
from ..moe.packed import KNOWN
from ..plan.buffers import PAGE
from ..plan.types import RankPlan
from .ahead import compile_launched
from .verdicts import is_known, verdict

LOG = logging.getLogger("tpx")
TESTED = ("attention", "linear", "sample")  # and the words that begin the names of their tests:
WORDS = {"linear": ("linear",), "sample": ("sample",)}  # all else is attention's


class Trial(NamedTuple):
    """A package's self_test. asked: its arguments after the device."""

    module: ModuleType
    asked: tuple[Any, ...]


class ExpertShapes(NamedTuple):
    """hidden, units: of an expert here. top_k of `experts`, of which `held` are here."""

    hidden: int
    units: int
    dtype: torch.dtype
    top_k: int
    experts: int
    held: int


class Shapes(NamedTuple):
    """What one rank runs. linears: (outputs, inputs) of its dense layers."""

    linears: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    page: int
    window: int
    dtype: torch.dtype
    experts: ExpertShapes


def shapes(rank_plan: RankPlan, dtype: torch.dtype) -> Shapes:
    """Of what the rank's kernels compute."""
    spec, cuts = rank_plan.spec, rank_plan.cuts
    heads, kv_heads = cuts["Q"].size, cuts["KV"].size
    width, hidden = spec.head_dim, spec.hidden_size
    head = cuts["V" if spec.tie_word_embeddings else "V_head"].size
    linears = ((heads + 2 * kv_heads) * width, hidden), (hidden, heads * width), (head, hidden)
    routing = spec.num_experts_per_tok, spec.num_local_experts, cuts["E"].size
    experts = ExpertShapes(hidden, cuts["I"].size, dtype, *routing)
    return Shapes(linears, heads, kv_heads, width, PAGE, spec.sliding_window, dtype, experts)


def compile_trials(
    loaded: Loaded, device: torch.device, shapes: Shapes, node: Group
) -> list[Failure]:
    """Compiles what `prove` will launch, unless what it would find is known. The ranks of a node
    call it together."""
    lacking = [
        trial
        for trial in trials(loaded, shapes)
        if not is_known(trial.module, device, trial.asked) and can_only_launch(trial.module)
    ]

    def launch(_: Noted) -> None:
        for module, asked in lacking:
            module.self_test(device, *asked, judge=False)

    return compile_launched(launch if lacking else None, device, node)


def trials(loaded: Loaded, shapes: Shapes) -> list[Trial]:
    modules = loaded.modules
    tested = {modules[o]: shapes[:-1] for o in TESTED if hasattr(modules.get(o), "self_test")}
    found = [Trial(*one) for one in tested.items()]
    if "experts" in modules:
        found.append(Trial(modules["experts"], shapes.experts))
    return found


def can_only_launch(module: ModuleType) -> bool:
    """Kernels of other publishers may have a self_test that always looks at what came out."""
    return "judge" in inspect.signature(module.self_test).parameters


def prove(loaded: Loaded, device: torch.device, shapes: Shapes) -> Loaded:
    """Without the kernels whose error is above their bound, each of which is logged."""
    chosen, modules, found = [], dict(loaded.modules), dict[ModuleType, dict[str, float]]()
    for choice in loaded.chosen.choices:
        module = modules.get(choice.operation)
        if module is not None and choice.operation in TESTED and hasattr(module, "self_test"):
            if module not in found:
                found[module] = errors(module, device, shapes)
            worst = found[module].get(choice.operation, 0.0)
            if worst > module.BOUND:
                del modules[choice.operation]
                choice = refuse(choice, worst, module.BOUND)
        chosen.append(choice)
    if "experts" in modules:
        try_unpacking(modules["experts"], device, shapes.experts)
    return Loaded(replace(loaded.chosen, choices=tuple(chosen)), modules)


def agreed(loaded: Loaded, world: Group) -> Loaded:
    """Without the kernels that another rank does without: ranks that compute in other ways would
    meet in other collectives. All ranks call it together."""
    told = world.gather_bytes(json.dumps([*loaded.modules]).encode(), "kernels.proved")
    without = dict[str, int]()
    for rank, names in enumerate(map(json.loads, told)):
        for operation in loaded.modules.keys() - set(names):
            without.setdefault(operation, rank)
    modules = {o: module for o, module in loaded.modules.items() if o not in without}
    choices = tuple(
        Choice(c.operation, "off", "", "", "", f"rank {without[c.operation]} does without")
        if c.operation in without
        else c
        for c in loaded.chosen.choices
    )
    return Loaded(replace(loaded.chosen, choices=choices), modules)


def errors(module: ModuleType, device: torch.device, shapes: Shapes) -> dict[str, float]:
    """The largest error of each operation; infinity where one is not a number."""
    asked = shapes[:-1]
    told = verdict(module, device, asked, lambda: module.self_test(device, *asked))
    worst = dict[str, float]()
    for name, error in told.items():
        operation = next((o for o, words in WORDS.items() if name.startswith(words)), "attention")
        error = math.inf if math.isnan(error) else error
        worst[operation] = max(worst.get(operation, 0.0), error)
    return worst


def try_unpacking(module: ModuleType, device: torch.device, asked: ExpertShapes) -> None:
    """So that packing the experts need not try."""
    safe = verdict(module, device, asked, lambda: module.self_test(device, *asked).safe)
    KNOWN[module, device, asked.hidden, asked.units, asked.dtype] = safe


def refuse(choice: Choice, error: float, bound: float) -> Choice:
    reason = f"{choice.repo} {choice.version} is off by {error:.2g} on this GPU, at most {bound:g}"
    LOG.warning("kernels for %s: off, %s", choice.operation, reason)
    return Choice(choice.operation, "off", "", "", "", reason)
