"""Whether this machine can run the ranks: each check says what it found, and what is doubtful.

A fault is what cannot work; a doubt is what often does not. Nothing here starts a process of CUDA.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from ..errors import LaunchError
from ..plan.device import Device
from .gpus import GpuState, Holder, joints
from .needs import Need, host_needs
from .room import locked_memory, memory_room, open_files, shared_memory

MODES = ("strict", "warn", "off")
SHM = 2**30  # bytes of /dev/shm; NCCL's documentation asks containers for as much
OPEN_FILES = 512  # of a rank, beside a few for each other rank
LOCKED = 64 * 2**20  # bytes; InfiniBand's queues are locked


class Check(NamedTuple):
    """One thing that was looked at. said: what was found; hint: what to type where it is bad."""

    name: str
    state: Literal["ok", "doubt", "fault"]
    said: str
    hint: str | None = None


class Machine(NamedTuple):
    """What the checks are about. device: "cuda" or "cpu", paper: what its libraries need; apart:
    ranks are on other machines too; needs: of the ranks here, none where there is no plan. gpus:
    all that are visible, the ranks' first; None: not known."""

    device: str
    paper: Device
    nproc: int
    world: int
    apart: bool
    needs: Sequence[Need]
    gpus: Sequence[GpuState] | None


def check_machine(machine: Machine, environ: Mapping[str, str]) -> list[Check]:
    """Every check that is about this machine, in the order in which they are told."""
    found = [*check_gpus(machine), *check_memory(machine)]
    if machine.device == "cuda" and machine.nproc > 1:
        found += [*check_joints(machine), check_shared_memory()]
    found.append(check_open_files(machine.world))
    if machine.apart:
        found.append(check_host_name(machine.device, environ))
        if machine.device == "cuda":
            found.append(check_locked_memory())
    return found


def refuse(checks: Sequence[Check], mode: str) -> None:
    """Raises LaunchError on the first fault, unless faults are only to be told."""
    faults = [check for check in checks if check.state == "fault"]
    if not faults or mode != "strict":
        return
    more = f"; {len(faults) - 1} more: add `--dry-run` to see all" if len(faults) > 1 else ""
    hint = faults[0].hint or "`--preflight warn` starts the ranks nevertheless"
    raise LaunchError(faults[0].said + more, hint)


def warnings(checks: Sequence[Check]) -> list[str]:
    """A line for each check that is not well."""
    return [
        f"warning: {check.said}" + (f"; {check.hint}" if check.hint else "")
        for check in checks
        if check.state != "ok"
    ]


def check_gpus(machine: Machine) -> Iterator[Check]:
    """Memory that is free now against what each rank needs, and who holds the rest."""
    if machine.device != "cuda":
        return
    if machine.gpus is None:
        said = "neither NVML nor nvidia-smi says how much memory is free"
        yield Check("GPUs", "doubt", said, "install the driver's tools in this container")
        return
    used = machine.gpus[: machine.nproc]
    yield from (c for g, n in zip(used, machine.needs, strict=False) if (c := check_gpu(g, n)))
    if all(has_room(g, n) for g, n in zip(used, machine.needs, strict=False)):
        least = min(used, key=lambda gpu: gpu.free)
        names = ", ".join(f"{len([*same])} {name}" for name, same in groupby(g.name for g in used))
        said = f"{names}; at least {gigabytes(least.free)} free of {gigabytes(least.total)}"
        yield Check("GPUs", "ok", said)


def has_room(gpu: GpuState, need: Need) -> bool:
    return gpu.free >= need.total


def check_gpu(gpu: GpuState, need: Need) -> Check | None:
    """None: it has room."""
    if has_room(gpu, need):
        return None
    said = (
        f"GPU {gpu.number} has {gigabytes(gpu.free)} free of {gigabytes(gpu.total)}, and rank "
        f"{need.rank} needs {gigabytes(need.total)}, {gigabytes(need.weights)} of them weights"
    )
    hint = "cut over more ranks, or use a smaller model"
    if gpu.holders:
        largest = max(gpu.holders, key=lambda holder: holder.nbytes or 0)
        said += f": {holder_words(largest, len(gpu.holders) - 1)}"
        hint = f"end it (`kill {largest.pid}`), or name other GPUs in `CUDA_VISIBLE_DEVICES`"
    elif gpu.total - gpu.free > need.libraries:
        said += ": a process that cannot be seen from here holds the rest"
        hint = "see `nvidia-smi` outside this container, or name others in `CUDA_VISIBLE_DEVICES`"
    return Check("GPUs", "fault", said, hint)


def holder_words(holder: Holder, others: int) -> str:
    name = f" (`{holder.name}`)" if holder.name else ""
    held = "the rest" if holder.nbytes is None else gigabytes(holder.nbytes)
    return f"process {holder.pid}{name} holds {held}" + (f", and {others} others" * (others > 0))


def check_memory(machine: Machine) -> Iterator[Check]:
    """Of the host: a process that takes more than there is gets killed without a word."""
    room = memory_room()
    if room is None or not machine.needs:
        return
    surely, about = host_needs(machine.needs, machine.paper)
    said = f"{gigabytes(room.free)} free on {room.of}, and {machine.nproc} ranks need "
    hint = "use more machines, or a smaller model; the kernel kills a rank that takes too much"
    if room.free < surely:
        yield Check("memory", "fault", f"{said}{gigabytes(surely)} to load", hint)
    elif room.free < about:
        yield Check("memory", "doubt", f"{said}about {gigabytes(about)} to load", hint)
    else:
        yield Check("memory", "ok", f"{said}about {gigabytes(about)}")


def check_joints(machine: Machine) -> Iterator[Check]:
    if machine.gpus is None:
        return
    indexes = [gpu.number for gpu in machine.gpus[: machine.nproc]]
    found = joints(indexes)
    if found is None:
        yield Check("links", "doubt", "NVML does not say whether GPUs reach each other's memory")
        return
    apart = [pair for pair, kind in found.items() if kind == "host"]
    if not apart:
        kinds = "".join(sorted(set(found.values())))
        names = {"NVLink": "NVLink", "PCIe": "PCIe", "NVLinkPCIe": "NVLink and PCIe"}
        yield Check("links", "ok", f"{len(indexes)} GPUs reach each other over {names[kinds]}")
        return
    first, second = apart[0]
    said = f"GPUs {first} and {second} cannot reach each other's memory"
    if len(apart) > 1:
        said += f", nor can {len(apart) - 1} other pairs"
    hint = "NCCL then goes through the host; if it hangs, an IOMMU or ACS is on: see `nccl` docs"
    yield Check("links", "doubt", said, hint)


def check_shared_memory() -> Check:
    free = shared_memory()
    hint = "start the container with `--shm-size=1g`, or mount a memory volume at /dev/shm"
    if free is None:
        return Check("/dev/shm", "doubt", "/dev/shm is missing, which NCCL uses", hint)
    if free < SHM:
        said = f"/dev/shm has {gigabytes(free)} free, and NCCL may need {gigabytes(SHM)}"
        return Check("/dev/shm", "doubt", said, hint)
    return Check("/dev/shm", "ok", f"{gigabytes(free)} free")


def check_open_files(world: int) -> Check:
    limit, wanted = open_files(), OPEN_FILES + 8 * world
    if limit is not None and limit < wanted:
        said = f"a process may open {limit} files, and {world} ranks may need {wanted} each"
        return Check("open files", "doubt", said, f"`ulimit -n {wanted}`")
    return Check("open files", "ok", "any number" if limit is None else f"{limit:,} a process")


def check_locked_memory() -> Check:
    limit = locked_memory()
    if limit is not None and limit < LOCKED:
        said = f"a process may lock {limit:,} bytes, and InfiniBand needs more"
        return Check("locked memory", "doubt", said, "`ulimit -l unlimited`")
    return Check("locked memory", "ok", "any" if limit is None else f"{limit:,} bytes a process")


def check_host_name(device: str, environ: Mapping[str, str]) -> Check:
    """gloo listens at the address that this machine's name stands for, NCCL at an interface's."""
    name, variable = socket.gethostname(), "GLOO_SOCKET_IFNAME"
    if device == "cuda":
        variable = "NCCL_SOCKET_IFNAME"
    if environ.get(variable):
        return Check("host name", "ok", f"{variable} is `{environ[variable]}`")
    hint = f"name it in /etc/hosts with an address that the others reach, or set `{variable}`"
    bad: Literal["doubt", "fault"] = "doubt" if device == "cuda" else "fault"
    try:
        found = sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None)})
    except OSError:
        return Check("host name", bad, f"this machine's name `{name}` has no address", hint)
    if all(is_loopback(one) for one in found):
        said = f"this machine's name `{name}` is {found[0]}, which no other machine reaches"
        return Check("host name", bad, said, hint)
    return Check("host name", "ok", f"`{name}` is {', '.join(found)}")


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
