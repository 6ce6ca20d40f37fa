"""models/load.py: every parameter is read, cast and assigned, one tensor at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from safetensors.torch import load_file
from tiny import tiny_config

from tpx.comm import Groups
from tpx.models import load
from tpx.plan.prepare import prepare

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("load"), tiny_config(), experts=request.param)


def load_model(folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, load.LoadReport]:
    prepared = prepare(folder, "tp1", 1)
    return load.load_model(prepared, prepared.rank_plan(0), Groups.alone(CPU), dtype, CPU)


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
    assert report.bytes_read == sum(tensor.nbytes for tensor in stored.values())
    assert report.bytes_held == sum(parameter.nbytes for parameter in parameters.values())
    assert report.seconds >= report.read_seconds > 0


def test_no_tensor_stays_in_memory_beside_its_cast_copy(folder, monkeypatch):
    read, alive = load.read_shards, []

    def watch(*args, **kwargs):
        for name, tensor in read(*args, **kwargs):
            assert not [other for other, ref in alive if ref() is not None]
            if tensor.dtype != torch.uint8:
                alive.append((name, weakref.ref(tensor)))
            yield name, tensor
            del tensor

    monkeypatch.setattr(load, "read_shards", watch)
    gc.disable()  # it must be gone at once, without a search for cycles
    try:
        load_model(folder, torch.float32)
    finally:
        gc.enable()
    assert len(alive) > 10


def test_a_parameter_that_was_not_read_is_noticed(folder):
    prepared = prepare(folder, "tp1", 1)
    plan = prepared.rank_plan(0)
    del plan.shards["model.norm.weight"]
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        load.load_model(prepared, plan, Groups.alone(CPU), torch.float32, CPU)


def test_a_shard_of_another_shape_is_noticed(folder):
    model, _ = load_model(folder, torch.float32)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        load.assign(model, "model.norm.weight", torch.zeros(3))
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        load.assign(model, "model.norm.weight", torch.zeros(64, dtype=torch.float16))
