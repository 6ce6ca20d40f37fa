"""Loading onto a GPU: the same bits as on the CPU, and no more memory than the bar."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from tiny import tiny_config

from tpx.comm import Groups
from tpx.models.load import load_model
from tpx.plan.prepare import prepare
from tpx.plan.spans import spans
from tpx.read import Arena, Files, Limits, ReadStats, device, load_spans

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "load", tiny_config(), seed=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("plan", "world"), [("tp1", 1), ("tp4-etp4", 4), ("ep2", 2)])
@pytest.mark.parametrize("limits", [None, Limits(4, 16384, 2)])
@pytest.mark.parametrize("cpp", [True, False], ids=["cpp", "python"])
def test_an_arena_on_the_gpu_has_the_bits_of_one_on_the_cpu(
    folder, dtype, plan, world, limits, cpp, monkeypatch
):
    if cpp:
        assert device.sender(torch.cuda.Stream()) is not None
    else:
        monkeypatch.setattr(device, "sender", lambda stream: None)
    prepared = prepare(str(folder), plan, world)
    rank_plan = prepared.rank_plan(world - 1)
    arenas = [Arena(rank_plan, dtype, each) for each in (CPU, GPU)]
    for arena in arenas:
        with Files(prepared.folder, prepared.index.files) as files:
            load_spans(spans(rank_plan), files, arena, ReadStats(), limits)
    for name in arenas[0].slots:
        here, there = (arena.view(name).contiguous().view(torch.uint8) for arena in arenas)
        assert torch.equal(here, there.cpu()), name


@pytest.mark.parametrize(("dtype", "beside"), [(torch.bfloat16, 1), (torch.float32, 9)])
def test_a_large_model_takes_little_more_than_it_holds(tmp_path, dtype, beside):
    """beside: MiB; one buffer more where values are cast."""
    config = tiny_config(hidden_size=1024, intermediate_size=1024, num_local_experts=32)
    prepared = prepare(make_checkpoint(tmp_path, config), "tp1", 1)
    plan = prepared.rank_plan(0)
    torch.cuda.empty_cache()
    model, report = load_model(prepared, plan, Groups.alone(GPU), dtype, GPU)
    assert report.device_peak is not None
    assert 1.0 <= report.device_peak <= 1.0 + (beside << 20) / report.bytes_held
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert report.copy_seconds > 0
