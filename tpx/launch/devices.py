"""How many GPUs a process would see, and which, without torch and without a CUDA context.

Asks NVML, the library under nvidia-smi; where it is missing, the kernel driver's own list.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
NVML = "libnvidia-ml.so.1"
DRIVER_LIST = Path("/proc/driver/nvidia/gpus")


class Gpu(NamedTuple):
    """memory: bytes in all. capability: CUDA's; None where the driver does not say."""

    name: str
    memory: int
    capability: tuple[int, int] | None = None


class NvmlMemory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong),
                ("used", ctypes.c_ulonglong)]  # fmt: skip


def count_gpus(environ: Mapping[str, str] | None = None) -> int:
    """GPUs that CUDA would see; CUDA_VISIBLE_DEVICES counts, empty as well as UUIDs."""
    environ = os.environ if environ is None else environ
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and not listed.strip():
        return 0
    uuids = nvml_uuids()
    if uuids is None:
        uuids = [""] * driver_count()
    return len(uuids) if listed is None else count_visible(listed, uuids)


def count_visible(listed: str, uuids: list[str]) -> int:
    return len(visible(listed, uuids))


def visible(listed: str, uuids: list[str]) -> list[str | int]:
    """The devices that CUDA_VISIBLE_DEVICES names, by index, in its order. CUDA stops at the first
    entry that names none, and sees none at all where one is named twice (CUDA C++ programming
    guide, environment variables). MIG devices are taken as they are, since only CUDA can tell."""
    seen: list[str | int] = []
    for entry in (part.strip() for part in listed.split(",")):
        device = find_device(entry, uuids)
        if device is None:
            break
        if device in seen:
            return []
        seen.append(device)
    return seen


def find_device(entry: str, uuids: list[str]) -> str | int | None:
    """An index, or a MIG device's name; None: there is no such device."""
    if entry.isdecimal():
        return int(entry) if int(entry) < len(uuids) else None
    if entry.startswith("MIG-"):
        return entry if uuids else None
    if not entry.startswith("GPU-"):
        return None
    found = [i for i, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def nvml_uuids() -> list[str] | None:
    """The UUID of each GPU; None where NVML cannot be used."""
    return ask_nvml(nvml_uuid)


def smallest_gpu() -> Gpu | None:
    """Of this machine's GPUs the one with the least memory; None where NVML does not say."""
    found = [gpu for gpu in ask_nvml(nvml_gpu) or [] if gpu is not None]
    return min(found, key=lambda gpu: gpu.memory) if found else None


def ask_nvml(question: Callable[[Any, int], T]) -> list[T] | None:
    """question(nvml, i) of each GPU i; None where NVML cannot be used."""
    try:
        nvml: Any = ctypes.CDLL(NVML)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        return [question(nvml, i) for i in range(count.value)]
    finally:
        nvml.nvmlShutdown()


def nvml_gpu(nvml: Any, i: int) -> Gpu | None:
    """None where the driver does not say, as for a device cut by MIG."""
    device, memory = nvml_handle(nvml, i), NvmlMemory()
    if device is None or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
        return None
    name = nvml_text(nvml.nvmlDeviceGetName, device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    pointers = ctypes.byref(major), ctypes.byref(minor)
    told = nvml.nvmlDeviceGetCudaComputeCapability(device, *pointers) == 0
    return Gpu(name, memory.total, (major.value, minor.value) if told else None) if name else None


def nvml_uuid(nvml: Any, i: int) -> str:
    """`GPU-...`, or "" where the driver does not say."""
    device = nvml_handle(nvml, i)
    return "" if device is None else nvml_text(nvml.nvmlDeviceGetUUID, device)


def nvml_handle(nvml: Any, i: int) -> Any:
    device = ctypes.c_void_p()
    return device if nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)) == 0 else None


def nvml_text(ask: Callable[[Any, Any, int], int], device: Any) -> str:
    """What a function of NVML writes, or "" where it fails."""
    text = ctypes.create_string_buffer(96)
    return text.value.decode() if ask(device, text, 96) == 0 else ""


def driver_count() -> int:
    """GPUs that the kernel driver lists and that have a device file here (containers hide some)."""
    if not DRIVER_LIST.is_dir():
        return 0
    shown = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").iterdir())
    return min(len(list(DRIVER_LIST.iterdir())), shown)
