"""What this machine's GPUs are doing: free memory, who holds the rest, and how they are joined.

Asks NVML, and nvidia-smi where NVML is missing; never CUDA, since a context in the launcher would
hold memory of every GPU for as long as the job runs.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .devices import NvmlMemory, ask_nvml, nvml_handle, nvml_text, nvml_uuid, visible

MOST_HOLDERS = 64
UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
READ, NVLINK = 0, 2  # nvmlGpuP2PCapsIndex_t
SMI_SECONDS = 5.0
PCI_DEVICES = Path("/sys/bus/pci/devices")
PROC = Path("/proc")


class Holder(NamedTuple):
    """A process that holds memory of a GPU; nbytes: None where the driver does not say."""

    pid: int
    nbytes: int | None
    name: str


class GpuState(NamedTuple):
    """number: as NVML counts. total, free: bytes. numa: None where the system does not say."""

    number: int
    uuid: str
    name: str
    total: int
    free: int
    holders: tuple[Holder, ...] = ()
    numa: int | None = None


class NvmlProcess(ctypes.Structure):  # nvmlProcessInfo_t, as of nvmlDeviceGet..._v3
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong),
                ("gpu_instance", ctypes.c_uint), ("compute_instance", ctypes.c_uint)]  # fmt: skip


class NvmlPci(ctypes.Structure):  # nvmlPciInfo_t
    _fields_ = [("legacy", ctypes.c_char * 16), ("domain", ctypes.c_uint), ("bus", ctypes.c_uint),
                ("device", ctypes.c_uint), ("pci_device", ctypes.c_uint),
                ("pci_sub_system", ctypes.c_uint), ("bus_id", ctypes.c_char * 32)]  # fmt: skip


def gpu_states(environ: Mapping[str, str] | None = None) -> list[GpuState] | None:
    """Of the GPUs that CUDA would see, in the order of CUDA_VISIBLE_DEVICES; None: not known."""
    environ = os.environ if environ is None else environ
    found = ask_nvml(nvml_state)
    if found is None:
        found = smi_states()
    if found is None or any(state is None for state in found):
        return None
    states = [state for state in found if state is not None]
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return states
    indexes = visible(listed, [state.uuid for state in states])
    return [states[i] for i in indexes if isinstance(i, int)]


def nvml_state(nvml: Any, i: int) -> GpuState | None:
    device, memory = nvml_handle(nvml, i), NvmlMemory()
    if device is None or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
        return None
    return GpuState(
        number=i,
        uuid=nvml_uuid(nvml, i),
        name=nvml_text(nvml.nvmlDeviceGetName, device),
        total=memory.total,
        free=memory.free,
        holders=nvml_holders(nvml, device),
        numa=nvml_numa(nvml, device),
    )


def nvml_holders(nvml: Any, device: Any) -> tuple[Holder, ...]:
    """Compute and graphics processes; none where the driver is too old, or hides them."""
    found: dict[int, Holder] = {}
    for kind in ("Compute", "Graphics"):
        ask = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3", None)
        listed, count = (NvmlProcess * MOST_HOLDERS)(), ctypes.c_uint(MOST_HOLDERS)
        if ask is None or ask(device, ctypes.byref(count), listed) != 0:
            continue
        for one in listed[: count.value]:
            used = None if one.used == UNKNOWN else int(one.used)
            found[one.pid] = Holder(one.pid, used, process_name(one.pid))
    return tuple(found.values())


def nvml_numa(nvml: Any, device: Any) -> int | None:
    pci = NvmlPci()
    if nvml.nvmlDeviceGetPciInfo_v3(device, ctypes.byref(pci)) != 0:
        return None
    return numa_of(pci.bus_id.decode())


def numa_of(bus_id: str) -> int | None:
    """Of `00000000:1B:00.0`, as the kernel's own list of PCI devices has it."""
    domain, _, place = bus_id.lower().partition(":")
    try:
        node = int((PCI_DEVICES / f"{domain[-4:]}:{place}" / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def process_name(pid: int) -> str:
    """What was typed to start it, short; empty where it is of another container."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    text = " ".join([Path(words[0]).name, *words[1:]]).strip()
    return text if len(text) <= 40 else f"{text[:37]}..."


def smi_states() -> list[GpuState | None] | None:
    """From nvidia-smi; None where it is missing or fails."""
    rows = smi("gpu", "uuid", "name", "memory.total", "memory.free", "pci.bus_id")
    if rows is None:
        return None
    holders: dict[str, list[Holder]] = {}
    for uuid, pid, used in smi("compute-apps", "gpu_uuid", "pid", "used_memory") or []:
        nbytes = int(used) * 2**20 if used.isdecimal() else None
        holders.setdefault(uuid, []).append(Holder(int(pid), nbytes, process_name(int(pid))))
    return [
        GpuState(i, uuid, name, int(total) * 2**20, int(free) * 2**20, tuple(holders.get(uuid, ())),
                 numa_of(bus))
        if total.isdecimal() and free.isdecimal() else None
        for i, (uuid, name, total, free, bus) in enumerate(rows)
    ]  # fmt: skip


def smi(what: str, *fields: str) -> list[list[str]] | None:
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    rows = [re.split(r",\s*", line) for line in done.stdout.splitlines() if line.strip()]
    return rows if all(len(row) == len(fields) for row in rows) else None


def joints(indexes: list[int]) -> dict[tuple[int, int], str] | None:
    """How each two of these GPUs reach each other: "NVLink", "PCIe" or "host" (no peer access).
    None: not known."""

    def from_one(nvml: Any, i: int) -> dict[tuple[int, int], str]:
        others = [j for j in indexes if j > i] if i in indexes else []
        return {(i, j): nvml_joint(nvml, i, j) for j in others}

    found = ask_nvml(from_one)
    if found is None:
        return None
    pairs = {pair: kind for one in found for pair, kind in one.items()}
    return pairs if all(pairs.values()) else None


def nvml_joint(nvml: Any, i: int, j: int) -> str:
    """ "" where the driver does not say."""
    first, second = nvml_handle(nvml, i), nvml_handle(nvml, j)
    said = []
    for kind in (NVLINK, READ):
        status = ctypes.c_int()
        if nvml.nvmlDeviceGetP2PStatus(first, second, kind, ctypes.byref(status)) != 0:
            return ""
        said.append(status.value == 0)
    return "NVLink" if said[0] else "PCIe" if said[1] else "host"
