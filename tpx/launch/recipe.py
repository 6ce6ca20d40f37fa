"""Recipes: the flags of `tpx launch` for one model on some hardware, each in a file with a name.

`tpx launch FAMILY/HARDWARE` reads launch/FAMILY/HARDWARE.yaml; flags that are typed beside it win.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PlanError, did_you_mean

if TYPE_CHECKING:
    from .recipe_file import Recipe

FORM = re.compile(r"[\w-]+/[\w.-]+")


def recipe_folder() -> Path:
    """The shipped recipes: beside the package in a wheel, else in the repository."""
    here = Path(__file__).resolve().parents[1]
    found = (f for f in (here / "recipes", here.parent / "launch") if f.is_dir())
    folder = next(found, None)
    assert folder is not None, f"no recipes beside {here}: the installation is incomplete"
    return folder


def shipped_recipes() -> dict[str, Path]:
    """By name: FAMILY/HARDWARE."""
    folder = recipe_folder()
    files = sorted(folder.glob("*/*.yaml"))
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return {name: path for name, path in names.items() if not name.startswith("templates/")}


def is_recipe(word: str) -> bool:
    """Whether the word can name a recipe and no file."""
    return bool(FORM.fullmatch(word)) and not word.endswith(".py") and not Path(word).exists()


def find_recipe(name: str) -> Recipe:
    """Raises PlanError where there is none of that name."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise PlanError(f"there is no recipe `{name}`", did_you_mean(name, shipped))
    from .recipe_file import read_recipe  # who names none does not pay for YAML

    return read_recipe(shipped[name].read_bytes(), name)
