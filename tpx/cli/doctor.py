"""`tpx doctor`: what this machine has, which kernels run on it, and why; exit code 1 on a fault."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from ..kernels import Kernels, choose, describe
from ..kernels.installed import installed
from ..launch.devices import Gpu, count_gpus, smallest_gpu
from ..launch.kernels_here import device_here, torch_cuda, wanted_here
from ..version import __version__

ABSENT = {  # and what it costs
    "torch": "nothing runs",
    "triton": "no kernels: the torch references run",
    "kernels": "no kernels of the Hugging Face Hub",
}


def add_parser(subparsers: Any) -> None:
    said = "what this machine has, and which kernels run on it"
    parser = subparsers.add_parser("doctor", description=f"Says {said}.")
    parser.add_argument(
        "--kernels", metavar="HOW", help="as of `tpx launch` (default: TPX_KERNELS)"
    )


def run(args: argparse.Namespace) -> int:
    """-> 0, or 1 where what is needed, or was asked for by name, is missing."""
    wanted = wanted_here(args.kernels)
    kernels = choose(wanted, device_here())
    found = {name: installed(name) for name in ABSENT}
    print(f"tpx      {__version__}, Python {platform.python_version()}, {platform.system()}")
    for name, version in found.items():
        print(f"{name:<8} {version or f'not installed: {ABSENT[name]}'}")
    gpu = smallest_gpu() if count_gpus() else None
    print(f"GPU      {gpu_words(gpu)}")
    print(*describe(kernels.choices), sep="\n")
    faults = find_faults(found, gpu, kernels)
    for fault in faults:
        print(f"fault: {fault}")
    return 1 if faults else 0


def gpu_words(gpu: Gpu | None) -> str:
    """Of the one with the least memory."""
    if gpu is None:
        return "none is visible"
    capability = f", capability {'.'.join(map(str, gpu.capability))}" if gpu.capability else ""
    return f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB{capability}"


def find_faults(found: dict[str, str | None], gpu: Gpu | None, kernels: Kernels) -> list[str]:
    faults = [] if found["torch"] else ["torch is not installed: `pip install torch`"]
    if found["torch"] and gpu is not None and torch_cuda() is None:
        faults.append(f"torch {found['torch']} is not built for CUDA: the GPU is not used")
    missing = kernels.missing()
    if missing:
        faults.append(f"kernels were asked for, and the references run {', '.join(missing)}")
    return faults
