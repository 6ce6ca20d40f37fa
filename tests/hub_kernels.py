"""A kernel's repository in miniature, and a Hub cache that holds its build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from build_kernels import build

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = """from __future__ import annotations

import torch

from ._ops import NAMESPACE

__version__ = "1"
Router = tuple


@torch.library.custom_op(f"{NAMESPACE}::route", mutates_args=())
def route(x: torch.Tensor) -> torch.Tensor:
    return x + 1
"""


def repository(folder: Path) -> Path:
    """kernels/tpx-moe, with one operation."""
    package = folder / "tpx-moe" / "torch-ext" / "tpx_moe"
    (package / "configs").mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    (package / "_ops.py").write_text('NAMESPACE = "tpx_moe"\n')
    (package / "configs" / "default.json").write_text("{}\n")
    metadata = {"name": "tpx-moe", "version": 1, "license": "Apache-2.0", "python-depends": []}
    (folder / "tpx-moe" / "metadata.json").write_text(json.dumps(metadata))
    return folder / "tpx-moe"


def fill_cache(cache: Path, source: Path, repo: str) -> Path:
    """Puts the repository's build for this machine where the Hub's client keeps one, as version 1;
    -> the build's folder there."""
    home = cache / f"kernels--{repo.replace('/', '--')}"
    there = home / "snapshots" / COMMIT / "build"
    shutil.copytree(build(source, "cpu"), there / "torch-cpu")
    (home / "refs").mkdir()
    (home / "refs" / "v1").write_text(COMMIT)
    return there / "torch-cpu"


def write_lock(path: Path, repo: str) -> Path:
    """As `kernels lock` does."""
    locks = [{"dependency": {"repo-id": repo, "version": 1}, "lock": {"commit": COMMIT}}]
    path.write_text(json.dumps(locks))
    return path
