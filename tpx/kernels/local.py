"""Finds the packages of kernels that ship with tpx, and imports them.

From a wheel or an editable install they are packages like any other; a source tree has them in
kernels/, where no import finds them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from .operations import Package

KERNELS = Path(__file__).parent.parent.parent / "kernels"


def find_local(package: Package) -> Path | None:
    """The package's folder, without importing it."""
    try:
        spec = importlib.util.find_spec(package.name)
    except ValueError:  # a module of this name without a spec
        spec = None
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    folder = KERNELS / package.folder / "torch-ext" / package.name
    return folder if (folder / "__init__.py").is_file() else None


def local_version(folder: Path) -> str:
    found = re.search(r'^__version__ = "(.+)"$', (folder / "__init__.py").read_text(), re.M)
    return found[1] if found else ""


def import_local(package: Package, folder: Path) -> ModuleType:
    """The package of this folder, under its own name, once a process: its operations are registered
    with torch."""
    if package.name in sys.modules or importlib.util.find_spec(package.name) is not None:
        return importlib.import_module(package.name)
    spec = importlib.util.spec_from_file_location(
        package.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[package.name]
        raise
    return module
