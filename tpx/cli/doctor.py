"""`tpx doctor`: what this machine has, which kernels run on it, and why; exit code 1 on a fault."""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Iterator
from typing import Any

from ..errors import PlanError
from ..kernels import Kernels, choose, describe
from ..kernels.installed import installed
from ..launch.checks import gigabytes, holder_words
from ..launch.devices import Gpu, count_gpus, smallest_gpu
from ..launch.gpus import gpu_states, joints
from ..launch.hardware import product_here
from ..launch.kernels_here import device_here, torch_cuda, wanted_here
from ..launch.links_file import find_links, library_versions
from ..launch.options import words
from ..launch.room import memory_room, shared_memory
from ..plan.topology import Topology
from ..version import __version__

COMPILERS = ("c++", "g++", "clang++")  # as ops/cpu/build.py tries them
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
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="start N ranks, and measure what they can send"
    )
    parser.add_argument("--device", metavar="cpu|cuda", help="of the ranks (default: as launch)")


def run(args: argparse.Namespace) -> int:
    """-> 0, or 1 where what is needed, or was asked for by name, is missing."""
    check_flags(args)
    wanted = wanted_here(args.kernels)
    kernels = choose(wanted, device_here())
    found = {name: installed(name) for name in ABSENT}
    print(f"tpx      {__version__}, Python {platform.python_version()}, {platform.system()}")
    for name, version in found.items():
        print(f"{name:<8} {version or f'not installed: {ABSENT[name]}'}")
    gpu = smallest_gpu() if count_gpus() else None
    print(f"GPU      {gpu_words(gpu)}")
    print(*describe(kernels.choices), sep="\n")
    for line in machine_lines(gpu is not None):
        print(line)
    faults = find_faults(found, gpu, kernels)
    code = 0
    if args.ranks is not None:
        from .doctor_ranks import test_ranks

        code, wrong = test_ranks(args.ranks, args.device, print)
        faults += [wrong] if wrong else []
    for fault in faults:
        print(f"fault: {fault}")
    return code or (1 if faults else 0)


def check_flags(args: argparse.Namespace) -> None:
    """Raises PlanError."""
    if args.ranks is None and args.device is not None:
        raise PlanError(
            f"`--device {args.device}` is of the ranks of a self-test", "add `--ranks 2`"
        )
    if args.ranks is not None and args.ranks < 2:
        raise PlanError(f"`--ranks {args.ranks}` cannot send anything", "use `--ranks 2` or more")
    if args.device is not None:
        words("cpu", "cuda")("--device", args.device)


def machine_lines(has_gpu: bool) -> Iterator[str]:
    """What is beside the kernels, and what its absence costs."""
    nccl = library_versions("nccl").get("nccl")
    if has_gpu or nccl:
        yield f"nccl     {nccl or 'not installed: ranks on several GPUs cannot talk'}"
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    yield f"compiler {compiler or 'none: the CPU runs the torch references, several times slower'}"
    if has_gpu:
        yield from gpu_lines()
        yield from joint_lines()
    room, shared = memory_room(), shared_memory()
    if room is not None:
        yield f"memory   {gigabytes(room.free)} free on {room.of}"
    yield f"/dev/shm {'missing' if shared is None else f'{gigabytes(shared)} free'}"
    yield find_links(product_here("cuda" if has_gpu else "cpu"), Topology(1, 2)).note


def gpu_lines() -> Iterator[str]:
    for gpu in gpu_states() or []:
        held = "".join(f"; {holder_words(one, 0)}" for one in gpu.holders)
        near = "" if gpu.numa is None else f", NUMA node {gpu.numa}"
        free = f"{gigabytes(gpu.free)} of {gigabytes(gpu.total)} free"
        yield f"GPU {gpu.number:<4} {free}{near}{held}"


def joint_lines() -> Iterator[str]:
    """Each way in which two GPUs are joined, with one pair."""
    found = joints([gpu.number for gpu in gpu_states() or []])
    for kind in sorted(set((found or {}).values())):
        pairs = [pair for pair, joined in (found or {}).items() if joined == kind]
        said = "no access to each other's memory" if kind == "host" else kind
        yield f"links    GPUs {pairs[0][0]} and {pairs[0][1]}: {said} ({len(pairs)} such pairs)"


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
