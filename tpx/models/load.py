"""One rank's model, from its plan: build on meta, read, cast, assign, prepare.

Beside what the model keeps, at most one tensor is in memory at a time.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from ..comm import Groups
from ..plan.prepare import Prepared
from ..plan.types import RankPlan
from ..read import Progress, ReadStats, read_shards
from . import BUILDERS


class LoadReport(NamedTuple):
    """What one rank read from files, and holds now. seconds: from an empty model to one that runs,
    of which reading took read_seconds."""

    bytes_read: int
    bytes_held: int
    seconds: float
    read_seconds: float


def load_model(
    prepared: Prepared,
    rank_plan: RankPlan,
    groups: Groups,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[nn.Module, LoadReport]:
    """The model on `device`: packed weights as they are stored, all others in `dtype`."""
    begin = time.perf_counter()
    spec, stats = prepared.spec, ReadStats()
    with torch.device("meta"):
        model = BUILDERS[spec.model_type](spec, rank_plan, groups, dtype)
    on_gpu = device.type == "cuda"
    for name, tensor in read_shards(rank_plan, prepared.folder, stats, progress, pin=on_gpu):
        kept = tensor.to(device)
        assign(model, name, kept if kept.dtype == torch.uint8 else kept.to(dtype))
        del tensor, kept  # before the next one is read
    tie(model, rank_plan)
    check_complete(model, rank_plan)
    for module in model.modules():
        prepare = getattr(module, "prepare", None)
        if callable(prepare):
            prepare()
    check_devices(model, device)
    report = LoadReport(
        stats.bytes_read, bytes_held(model), time.perf_counter() - begin, stats.seconds
    )
    return model.eval(), report


def assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of the parameter of this name."""
    expected = model.get_parameter(name)
    assert tensor.shape == expected.shape, f"{name}: {tensor.shape=} {expected.shape=}"
    assert tensor.dtype == expected.dtype, f"{name}: {tensor.dtype=} {expected.dtype=}"
    place(model, name, nn.Parameter(tensor, requires_grad=False))


def place(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def tie(model: nn.Module, rank_plan: RankPlan) -> None:
    """Parameters that share another's storage."""
    for name, shard in rank_plan.shards.items():
        if shard.tied_to is not None:
            place(model, name, model.get_parameter(shard.tied_to))


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


def bytes_held(model: nn.Module) -> int:
    """Of parameters; one that is tied counts once."""
    return sum(parameter.nbytes for parameter in model.parameters())
