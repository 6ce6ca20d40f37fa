"""One rank's model, from its plan: build on meta, read, assign, pack, prepare.

All parameters lie in one arena, each in the slot that its final form needs; nothing is held twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn

from ..comm import Groups
from ..exchange import load_shared
from ..ops.kernel import REFERENCE, Kernels
from ..plan.device import CPU, Device, device_of
from ..plan.fetch import check_fetched
from ..plan.once import Share, plan_node
from ..plan.prepare import Prepared
from ..plan.types import RankPlan
from ..read import Arena, Files, Memory, ReadStats, load_spans
from . import BUILDERS

Progress = Callable[[int, int], None]  # bytes read, bytes in all


class LoadReport(NamedTuple):
    """What one rank read from files, and holds now.

    bytes_kept: of the shards, in the checkpoint's form. bytes_received: of these, from other ranks
    of the machine. bytes_held: in the final form. seconds:
    from an empty model to one that runs; reading and copying overlap. device_peak: the most device
    memory in use, as a multiple of bytes_held; None on a CPU. host_peak: the most bytes of
    anonymous and page-locked memory beside the weights.
    """

    bytes_read: int
    bytes_kept: int
    bytes_received: int
    bytes_held: int
    seconds: float
    read_seconds: float
    copy_seconds: float
    prepare_seconds: float
    device_peak: float | None
    host_peak: int

    @property
    def read_amplification(self) -> float:
        return self.bytes_read / self.bytes_kept if self.bytes_kept else 1.0


class Packs(Protocol):
    """A module that keeps parameters in a kernel's layout, in their own slots."""

    def packed_nbytes(self) -> dict[str, int]:
        """Bytes of each of its parameters that it packs."""
        ...

    def pack(self, memory: Memory) -> None:
        """Moves its parameters' bytes, through memory.scratch, within their slots."""
        ...


def load_model(
    prepared: Prepared,
    rank_plan: RankPlan,
    groups: Groups,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    share: Share = "auto",
    kernels: Kernels = REFERENCE,
) -> tuple[nn.Module, LoadReport]:
    """The model on `device`: uint8 as it is stored, or as a kernel packs it, all else in `dtype`.

    share: whether ranks of a node read for each other. Raises CheckpointError.
    """
    begin = time.perf_counter()
    check_fetched(prepared.folder, rank_plan)
    device_before = start_peak(device)
    with torch.device("meta"):
        build = BUILDERS[prepared.spec.model_type]
        model = build(prepared.spec, rank_plan, groups, dtype, kernels)
    packed = packed_bytes(model)
    arena = Arena(rank_plan, dtype, device, packed)
    stats, received = read(arena, prepared, rank_plan, groups, progress, share)
    assign(model, {name: arena.view(name) for name in arena.slots})
    tie(model, rank_plan)
    check_complete(model, rank_plan)
    prepare_begin = time.perf_counter()
    pack(model, arena, packed)
    for module in model.modules():
        finish = getattr(module, "prepare", None)
        if callable(finish):
            finish()
    check_devices(model, device)
    held = sum(slot.nbytes for slot in arena.slots.values())
    end = time.perf_counter()
    report = LoadReport(
        bytes_read=stats.bytes_read,
        bytes_kept=stats.bytes_kept,
        bytes_received=received,
        bytes_held=held,
        seconds=end - begin,
        read_seconds=stats.read_seconds,
        copy_seconds=stats.copy_seconds,
        prepare_seconds=end - prepare_begin,
        device_peak=peak_over(device, device_before, held),
        host_peak=max(0, stats.host_peak - (held if device.type == "cpu" else 0)),
    )
    return model.eval(), report


def read(
    arena: Arena,
    prepared: Prepared,
    rank_plan: RankPlan,
    groups: Groups,
    progress: Progress | None,
    share: Share,
) -> tuple[ReadStats, int]:
    """Fills the arena: what this rank reads for itself, then what the node's ranks share; -> bytes
    that came from them."""
    node = groups["node"]
    plans = [rank_plan if r == groups.rank else prepared.rank_plan(r) for r in node.ranks]
    plan = plan_node(plans, share, device=speeds_of(arena.device))
    total = plan.bytes_read[node.rank]
    stats = ReadStats(None if progress is None else lambda done: progress(done, total))
    with Files(prepared.folder, prepared.index.files) as files:
        load_spans(plan.own[node.rank], files, arena, stats)
        received = load_shared(plan.rounds, files, arena, node, stats)
        files.check()
    return stats, received


def speeds_of(device: torch.device) -> Device:
    return device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else CPU


def packed_bytes(model: nn.Module) -> dict[str, int]:
    """Of each parameter that a module packs."""
    found = dict[str, int]()
    for name, module in model.named_modules():
        if hasattr(module, "packed_nbytes"):
            sizes = cast(Packs, module).packed_nbytes()
            found |= {f"{name}.{leaf}" if name else leaf: size for leaf, size in sizes.items()}
    return found


def pack(model: nn.Module, arena: Arena, packed: Mapping[str, int]) -> None:
    """Lets the modules that have packed parameters pack them, through one scratch as large as the
    largest slot among them."""
    if not packed:
        return
    most = max(arena.slots[name].nbytes for name in packed)
    scratch = torch.empty(most, dtype=torch.uint8, device=arena.device)
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in packed):
        module = cast(Packs, model.get_submodule(owner))
        module.pack(Memory(arena, owner, scratch))


def start_peak(device: torch.device) -> int:
    """Device memory in use, from which on its peak is counted; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_over(device: torch.device, before: int, held: int) -> float | None:
    if device.type == "cpu" or not held:
        return None
    return (torch.cuda.max_memory_allocated(device) - before) / held


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts tensors in the places of the parameters of their names."""
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        expected = getattr(modules[owner], leaf)
        assert tensor.shape == expected.shape, f"{name}: {tensor.shape=} {expected.shape=}"
        assert tensor.dtype == expected.dtype, f"{name}: {tensor.dtype=} {expected.dtype=}"
        setattr(modules[owner], leaf, nn.Parameter(tensor, requires_grad=False))


def tie(model: nn.Module, rank_plan: RankPlan) -> None:
    """Parameters that share another's storage."""
    for name, shard in rank_plan.shards.items():
        if shard.tied_to is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(shard.tied_to))


def check_complete(model: nn.Module, rank_plan: RankPlan) -> None:
    """The plan names the model's parameters, all of them, and each has been read."""
    names = dict(model.named_parameters(remove_duplicate=False))
    assert names.keys() == rank_plan.shards.keys(), f"{names.keys() ^ rank_plan.shards.keys()}"
    unread = [name for name, parameter in names.items() if parameter.is_meta]
    assert not unread, f"{unread=}"


def check_devices(model: nn.Module, device: torch.device) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != device.type]
    assert not elsewhere, f"{elsewhere=} {device=}"
