"""models/load.py: every parameter is read, cast and assigned; packing stays in the slots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from byte_plans import Bare
from make_checkpoint import make_checkpoint
from reading import one_shard
from safetensors.torch import load_file
from tiny import tiny_config
from torch import nn

from tpx.comm import Groups
from tpx.errors import CheckpointError
from tpx.models import load
from tpx.plan.prepare import prepare
from tpx.read import Arena, Memory

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("load"), tiny_config(), experts=request.param)


def load_model(
    folder: Path, dtype: torch.dtype, progress: load.Progress | None = None
) -> tuple[nn.Module, load.LoadReport]:
    prepared = prepare(folder, "tp1", 1)
    plan, groups = prepared.rank_plan(0), Groups.alone(CPU)
    return load.load_model(prepared, plan, groups, dtype, CPU, progress)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_the_checkpoints_in_the_compute_dtype_and_packed_ones_as_stored(
    folder, dtype
):
    model, report = load_model(folder, dtype)
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    for name, parameter in parameters.items():
        expected = stored[name]
        wanted = expected if expected.dtype == torch.uint8 else expected.to(dtype)
        assert parameter.dtype == wanted.dtype
        assert torch.equal(parameter, wanted), name
    kept = sum(tensor.nbytes for tensor in stored.values())
    assert report.bytes_read == report.bytes_kept == kept
    assert report.read_amplification == 1.0
    assert report.bytes_held == sum(parameter.nbytes for parameter in parameters.values())
    assert report.seconds >= report.read_seconds > 0
    assert report.seconds >= report.prepare_seconds > 0
    assert (report.copy_seconds > 0) == (dtype != torch.bfloat16)
    assert report.device_peak is None
    assert report.host_peak < 32 << 20


def test_progress_ends_at_all_bytes(folder):
    steps = list[tuple[int, int]]()
    _, report = load_model(folder, torch.float32, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (report.bytes_read, report.bytes_read)
    assert {total for _, total in steps} == {report.bytes_read}


def test_nothing_is_held_twice(folder):
    """All parameters are views of one allocation, as large as they are and not larger."""
    model, report = load_model(folder, torch.float32)
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == 1
    assert storages[0].nbytes() <= report.bytes_held + 512 * len(storages)


def test_a_file_that_changed_since_its_header_was_checked_is_an_error(folder):
    prepared = prepare(folder, "tp1", 1)
    path = max(folder.glob("*.safetensors"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="changed after its header was checked"):
        load.load_model(prepared, prepared.rank_plan(0), Groups.alone(CPU), torch.bfloat16, CPU)


def test_a_parameter_that_was_not_read_is_noticed(folder):
    prepared = prepare(folder, "tp1", 1)
    plan = prepared.rank_plan(0)
    del plan.shards["model.norm.weight"]
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        load.load_model(prepared, plan, Groups.alone(CPU), torch.float32, CPU)


def test_a_shard_of_another_shape_is_noticed(folder):
    model, _ = load_model(folder, torch.float32)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        load.assign(model, {"model.norm.weight": torch.zeros(3)})
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        load.assign(model, {"model.norm.weight": torch.zeros(64, dtype=torch.float16)})


class Reversed(nn.Module):
    """Keeps `weight` back to front and padded to 64 bytes, as a kernel might."""

    def __init__(self, nbytes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nbytes, dtype=torch.uint8, device="meta"), False)

    def pack(self, memory: Memory) -> None:
        slot, count = memory.slot("weight"), self.weight.nbytes
        memory.scratch[:count].copy_(self.weight)
        slot.zero_()
        slot[:count].copy_(memory.scratch[:count].flip(0))
        self.weight = nn.Parameter(slot, requires_grad=False)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = Reversed(100), Reversed(70)
        self.plain = nn.Linear(2, 3, bias=False, device="meta")


def test_a_module_packs_its_parameters_in_their_slots_through_one_scratch(monkeypatch):
    model = Toy()
    shards = {
        **one_shard((100,), "U8", "large.weight"),
        **one_shard((70,), "U8", "small.weight"),
        **one_shard((3, 2), "F32", "plain.weight"),
    }
    packed = {"large.weight": 128, "small.weight": 128}
    arena = Arena(Bare(shards), torch.float32, CPU, packed)
    assert [arena.slots[name].nbytes for name in shards] == [128, 128, 24]
    for name in shards:
        arena.flat(name).copy_(torch.arange(arena.flat(name).numel()))
    load.assign(model, {name: arena.view(name) for name in shards})
    scratches = list[tuple[int, int]]()
    pack = Reversed.pack

    def watch(self: Reversed, memory: Memory) -> None:
        scratches.append((memory.scratch.data_ptr(), memory.scratch.nbytes))
        pack(self, memory)

    monkeypatch.setattr(Reversed, "pack", watch)
    load.pack(model, arena, packed)
    assert len(scratches) == 2
    assert {nbytes for _, nbytes in scratches} == {128}
    assert len(set(scratches)) == 1
    for module, count in ((model.large, 100), (model.small, 70)):
        assert module.weight.data_ptr() % 64 == 0
        assert module.weight.untyped_storage().data_ptr() == arena.data.data_ptr()
        assert module.weight.tolist() == [*range(count)][::-1] + [0] * (128 - count)
    assert torch.equal(model.plain.weight, torch.arange(6.0).view(3, 2))


def test_nothing_is_allocated_where_no_module_packs(folder, monkeypatch):
    monkeypatch.setattr(load, "Memory", None)
    load_model(folder, torch.float32)
