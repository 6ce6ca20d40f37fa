"""Kernels of the Hugging Face Hub, through its own library, which is optional."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import RequestError
from .installed import LEAST, why_not

LIBRARY = "kernels"


class Origin(NamedTuple):
    """What the Hub's library says of a kernel that it has imported."""

    version: str
    path: str


def check_library(operation: str, repo: str) -> None:
    fault = why_not(LIBRARY)
    if fault is not None:
        least = ".".join(map(str, LEAST[LIBRARY]))
        raise RequestError(
            f"`{operation}` asks for `{repo}` of the Hub, and {fault}",
            f"`pip install 'kernels>={least}'`, or leave `use_kernels` out",
        )


def find_cached(repo: str, version: str) -> Path | None:
    """The folder of a build for this machine that was fetched before; asks no network."""
    if why_not(LIBRARY) is not None:
        return None
    try:
        return Path(_library().install_kernel(repo, **_which(version), local_files_only=True))
    except (ValueError, OSError):  # no such version in the cache; no build for this machine
        return None


def import_cached(repo: str, folder: Path) -> tuple[ModuleType, Origin]:
    with _errors(repo):
        module: ModuleType = _library().get_local_kernel(folder)
    return module, _origin(module)


def import_kernel(
    repo: str, version: str, lockfile: str | None, trusts: bool
) -> tuple[ModuleType, Origin]:
    """Fetches it unless it is in the cache. version: a number, or a branch or commit; the lock file
    has its own. Raises RequestError."""
    trusted = [repo] if trusts else False
    library = _library()
    with _errors(repo):
        if lockfile is not None:
            path = Path(lockfile)
            module = library.get_locked_kernel(repo, lockfile=path, trust_remote_code=trusted)
        else:
            module = library.get_kernel(repo, **_which(version), trust_remote_code=trusted)
    return module, _origin(module)


def _library() -> Any:
    return importlib.import_module(LIBRARY)


def _which(version: str) -> dict[str, int | str]:
    return {"version": int(version)} if version.isdecimal() else {"revision": version}


def _origin(module: ModuleType) -> Origin:
    [loaded] = [one for one in _library().get_loaded_kernels() if one.module is module]
    commit = f", commit {loaded.repo_info.revision[:12]}" if loaded.repo_info else ""
    return Origin(f"{loaded.metadata.version}{commit}", str(Path(str(module.__file__)).parent))


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    """A foreign module is run here, so that anything can be raised."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RequestError(
            f"kernel `{repo}` of the Hub cannot be used: {said.rstrip('.:')}",
            "`use_kernels` names another, or leave it out",
        ) from error
