"""Which kernels this machine was asked for, and the device they would run on, without torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..kernels import Device, Wanted, read_wanted
from .devices import count_gpus, smallest_gpu


def wanted_here(flag: str | None, environ: Mapping[str, str] | None = None) -> Wanted:
    """flag: `--kernels`, else TPX_KERNELS. Raises RequestError."""
    if flag is not None:
        return read_wanted(flag, "--kernels")
    environ = os.environ if environ is None else environ
    return read_wanted(environ.get("TPX_KERNELS") or None, "TPX_KERNELS")


def device_here(environ: Mapping[str, str] | None = None) -> Device:
    """The visible GPU with the least memory, where torch is built for it; else the CPU."""
    gpu = smallest_gpu() if count_gpus(environ) else None
    if gpu is None or torch_cuda() is None:
        return Device("cpu")
    return Device("cuda", gpu.name, gpu.capability)


def torch_cuda() -> str | None:
    """The CUDA version that torch is built for, from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^cuda\b.*= '(.+)'$", text, re.MULTILINE)
    return found[1] if found else None
