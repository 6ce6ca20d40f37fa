"""Imports the chosen kernels. The only place that runs their code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..errors import RequestError
from .choice import Choice, Kernels
from .hub import import_cached, import_kernel
from .local import import_local
from .operations import OPERATIONS
from .wanted import Wanted


class Loaded(NamedTuple):
    """modules: by operation; the torch reference runs one that is not there."""

    chosen: Kernels
    modules: dict[str, ModuleType]


def load(kernels: Kernels) -> Loaded:
    """-> with what is known of a kernel once it is there. Raises RequestError."""
    choices, modules = [], {}
    for choice in kernels.choices:
        if choice.source != "off":
            choice, module = _load(choice, kernels.wanted)
            check_functions(choice, module)
            modules[choice.operation] = module
        choices.append(choice)
    return Loaded(replace(kernels, choices=tuple(choices)), modules)


def check_functions(choice: Choice, module: ModuleType) -> None:
    """That the kernel offers what its operation calls."""
    sets = OPERATIONS[choice.operation].functions
    missing = [[name for name in names if not hasattr(module, name)] for names in sets]
    if all(missing):
        raise RequestError(
            f"kernel `{choice.repo}` has no `{missing[-1][0]}`, which `{choice.operation}` needs",
            f"name another kernel for `{choice.operation}`, or leave it out of `use_kernels`",
        )


def _load(choice: Choice, wanted: Wanted) -> tuple[Choice, ModuleType]:
    if choice.source == "local":
        package = OPERATIONS[choice.operation].package
        return choice, import_local(package, Path(choice.path))
    if choice.path:
        module, origin = import_cached(choice.repo, Path(choice.path))
    else:
        given = choice.version, wanted.lockfile, wanted.trusts
        module, origin = import_kernel(choice.repo, *given)
    return choice._replace(version=origin.version, path=origin.path), module
