"""Which of the optional distributions are there."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

LEAST = {"triton": (3, 6), "kernels": (0, 17)}


def installed(name: str) -> str | None:
    """Its version. Its metadata is asked: a folder of that name can be imported as well."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def why_not(name: str) -> str | None:
    """What is wrong with a distribution of LEAST; None: nothing."""
    found, least = installed(name), LEAST[name]
    if found is None:
        return f"{name} is not installed"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < least:
        return f"{name} {found} is older than {'.'.join(map(str, least))}"
    return None
