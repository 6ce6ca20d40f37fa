"""What the device at hand can run."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch

LEAST = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}  # capabilities
ASSEMBLY = (8, 0)  # products of bfloat16 pairs
DEPENDENT = (9, 0)  # programmatic dependent launch
TENSOR_CORES = (8, 0)  # that triton uses


class Mode(NamedTuple):
    """asm: codes are unpacked by assembly instead of elementwise. dependent: a kernel may start
    while the one before it still runs. Without them the same bits come out, later. tensor_cores:
    whether products of matrices are worth their registers."""

    asm: bool
    dependent: bool
    tensor_cores: bool = True


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there: triton, and an NVIDIA device that knows the dtype."""
    if device.type != "cuda" or torch.version.cuda is None or not has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= LEAST.get(dtype, LEAST[torch.float16])


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def mode(device: torch.device, dtype: torch.dtype) -> Mode:
    """The fastest that is meant for the device; the interpreter on a CPU knows neither."""
    if device.type != "cuda":
        return Mode(False, False)
    capability = torch.cuda.get_device_capability(device)
    return Mode(
        dtype == torch.bfloat16 and capability >= ASSEMBLY,
        capability >= DEPENDENT,
        capability >= TENSOR_CORES,
    )


@functools.cache
def names(device: torch.device) -> tuple[str, ...]:
    """Of its table of configurations: the device's own, then its capability's."""
    if device.type != "cuda":
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"
