"""What the device at hand can run."""

from __future__ import annotations

import functools
import importlib.util

import torch


def available(device: torch.device) -> bool:
    """Whether the kernels run there: an NVIDIA device and an installed triton."""
    return device.type == "cuda" and torch.version.cuda is not None and has_triton()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for the CPU, where triton's interpreter runs the kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def plain(device: torch.device) -> bool:
    """Whether products are of operands upcast to float32: the interpreter computes bfloat16
    wrongly."""
    return device.type != "cuda"


def dependent(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it still runs (programmatic dependent
    launch)."""
    return capability(device) >= (9, 0)


def launch_options(device: torch.device, warps: int, stages: int = 1) -> dict[str, object]:
    """Keyword arguments of a launch there; the interpreter takes no launch_pdl."""
    options: dict[str, object] = {"num_warps": warps, "num_stages": stages}
    if dependent(device):
        options["launch_pdl"] = True
    return options
