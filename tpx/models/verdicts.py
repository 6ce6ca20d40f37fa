"""What the kernels' trials found, kept on disk: the same code on the same kind of device gives the
same numbers, and a trial takes seconds even where everything is compiled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..kernels.installed import installed
from ..launch.beat import COMPILE, tick
from ..ops.cpu.build import cache_folder

SOURCES = ("*.py", "*.json")


def verdict(module: ModuleType, device: torch.device, asked: object, run: Callable[[], Any]) -> Any:
    """What `run` gives, as JSON has it, or gave before: for this package's files, versions, device
    and `asked`, whatever the trial depends on besides. Of a module without a file nothing is kept.
    """
    path = record(module, device, asked)
    if path is None:
        return tried(run)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        found = tried(run)
        keep(path, json.dumps(found))
        return found


def is_known(module: ModuleType, device: torch.device, asked: object) -> bool:
    """Whether `verdict` would find what it kept, and not run the trial."""
    path = record(module, device, asked)
    return path is not None and path.exists()


def record(module: ModuleType, device: torch.device, asked: object) -> Path | None:
    if getattr(module, "__file__", None) is None:
        return None
    name = f"trial-{module.__name__}-{fingerprint([folder_of(module)], device, asked)}.json"
    return cache_folder() / name


def tried(run: Callable[[], Any]) -> Any:
    tick(COMPILE)
    found = run()
    tick()
    return found


def folder_of(module: ModuleType) -> Path:
    return Path(str(module.__file__)).parent


def fingerprint(folders: Iterable[Path], device: torch.device, asked: object) -> str:
    """Of the sources below the folders, versions, device and `asked`."""
    found = hashlib.sha256()
    versions = [torch.__version__, torch.version.cuda, installed("triton")]
    for part in (versions, device_words(device), asked):
        found.update(repr(part).encode())
    for folder in folders:
        for path in sorted(path for kind in SOURCES for path in folder.rglob(kind)):
            found.update(path.read_bytes())
    return found.hexdigest()[:20]


def device_words(device: torch.device) -> tuple[object, ...]:
    if device.type != "cuda":
        return (device.type,)
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def keep(path: Path, text: str) -> None:
    """Whole or not at all; a folder that cannot be written costs the next start a trial."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return
