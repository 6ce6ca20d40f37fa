"""Compiles kernels before they are launched, once a node.

What a piece of code would launch is noted on every rank; the first rank of the node compiles all of
it, and the cache on disk serves them all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..comm import Group
from ..kernels.compiling import Failure, Noted, cache_of_kernels, compile_all, noting
from ..kernels.installed import why_not
from ..launch.beat import COMPILE, tick
from .verdicts import fingerprint, folder_of, keep

LOG = logging.getLogger("tpx")
Launch = Callable[[Noted], None]
LAUNCHING = ("engine", "layers", "models", "moe", "ops")  # what decides what a step launches


def compiles(device: torch.device) -> bool:
    return device.type == "cuda" and why_not("triton") is None


def compile_launched(launch: Launch | None, device: torch.device, node: Group) -> list[Failure]:
    """Compiles what `launch` launches; None: nothing lacks here. The ranks of a node call it
    together. Nothing is launched, so `launch` may depend on no value that a kernel writes. -> what
    could not be compiled, on the node's first rank; its launch will try again."""
    if not compiles(device):
        return []
    jobs = []
    if launch is not None:
        with noting() as noted:
            launch(noted)
        jobs = noted.jobs
    told = node.gather_bytes(json.dumps(jobs).encode(), "kernels.jobs")
    every = list(dict.fromkeys(job for one in told for job in json.loads(one)))
    if not every:
        return []
    tick(COMPILE)
    began = perf_counter()
    failures = compile_all(every) if node.rank == 0 else []
    node.gather_bytes(b"compiled", "kernels.compiled")  # the others wait for the first
    tick()
    LOG.debug("%d kernels compiled ahead in %.1f s", len(every), perf_counter() - began)
    return failures


class Blank(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What an operation gives whose kernels were not launched is zeros within: the experts that a
    kernel chooses are indices elsewhere."""

    def __init__(self, noted: Noted):
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted = noted

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes 5 s

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.noted.skipped
        given = func(*args, **(kwargs or {}))
        if self.noted.skipped != before:
            for x in tree_leaves(given):
                if isinstance(x, torch.Tensor):
                    x.zero_()
        return given


def marker(modules: Iterable[ModuleType], device: torch.device, asked: object) -> Path | None:
    """A file that says that the kernels of a model's steps were compiled: for these packages and
    this code, these versions, device and `asked`. It lies in the cache where those kernels are, so
    that it goes where they go. None: a package has no file."""
    modules = sorted(set(modules), key=lambda module: module.__name__)
    if any(getattr(module, "__file__", None) is None for module in modules):
        return None
    here = Path(__file__).parent.parent
    folders = [*map(folder_of, modules), *(here / name for name in LAUNCHING)]
    return cache_of_kernels() / f"tpx-steps-{fingerprint(folders, device, asked)}.json"


def mark(path: Path | None) -> None:
    if path is not None:
        keep(path, "{}")
