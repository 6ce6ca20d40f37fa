"""The model on the packages of kernels, which on a CPU run their torch references: everything but
the kernels themselves, on one rank and on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from make_checkpoint import make_checkpoint
from paged import Pages
from parity import config
from ranks import ranks

from tpx.batch import FULL, SLIDING
from tpx.comm import Groups
from tpx.kernels.local import find_local, import_local
from tpx.kernels.operations import OPERATIONS
from tpx.models.load import load_model
from tpx.ops.kernel import REFERENCE
from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan
from tpx.plan.prepare import prepare

WINDOW, CPU = 8, torch.device("cpu")
# 3 blocks of intermediate units, so that etp cuts them unevenly.
DESCRIBED = config(64, 3, 8, 2, heads=8, kv_heads=2, head_dim=8, vocab=131, window=WINDOW)
STEPS = [[[11, 5, 9, 120, 7, 3, 2, 64, 65, 66, 67, 130], [4]], [[17], [18]], [[1, 2, 3], [8]]]


def modules(*operations: str) -> dict[str, Any]:
    """Of all operations, or of these alone."""
    found = {}
    for name in operations or OPERATIONS:
        package = OPERATIONS[name].package
        folder = find_local(package)
        assert folder is not None
        found[name] = import_local(package, folder)
    return found


def observe(folder: str, plan: str, world: int, operations: tuple[str, ...] | None) -> list[Any]:
    """Logits of three steps on every rank, and what the rank holds. operations: None for none."""
    prepared = prepare(folder, plan, world)
    rank = torch.distributed.get_rank() if world > 1 else 0
    mesh = prepared.plan.mesh
    groups = Groups(mesh, rank, CPU) if world > 1 else Groups.alone(CPU)
    rank_plan = prepared.rank_plan(rank)
    kernels = REFERENCE if operations is None else modules(*operations)
    model, _ = load_model(prepared, rank_plan, groups, torch.float32, CPU, kernels=kernels)
    kinds = [FULL if k == "full_attention" else SLIDING for k in prepared.spec.layer_types]
    pages = Pages(kinds, rank_plan.cuts["KV"].size, prepared.spec.head_dim, WINDOW)
    found = []
    with torch.inference_mode():
        for tokens in STEPS:
            mine = tokens if mesh.coords(rank).dp == 0 else []
            batch = pages.step(mine)
            longest, decode = sum(map(len, tokens)), all(len(one) == 1 for one in tokens)
            found.append(model(batch._replace(longest=longest, decode=decode), pages.caches))
    groups.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), DESCRIBED, seed=3))


@pytest.fixture(scope="module")
def expected(folder):
    return observe(folder, "tp1", 1, None)


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operations", [(), *((name,) for name in OPERATIONS)])
def test_logits_are_those_of_the_reference_whichever_kernels_run(operations, folder, expected):
    close(observe(folder, "tp1", 1, operations), expected)


@pytest.mark.parametrize("plan", ["tp2", "ep2", "tp2-etp2", "dp2-ep2"])
def test_ranks_give_the_logits_of_one_rank(plan, folder, expected):
    mesh = load_plan(shipped_plans("gpt_oss")[plan]).mesh
    for rank, found in enumerate(ranks(mesh.world).run(observe, folder, plan, mesh.world, ())):
        if mesh.coords(rank).dp == 0:
            close(found, expected)


def test_packed_experts_are_the_checkpoints_byte_for_byte(folder):
    prepared, made = prepare(folder, "tp1", 1), modules()
    plain, packed = (
        load_model(
            prepared, prepared.rank_plan(0), Groups.alone(CPU), torch.float32, CPU, kernels=k
        )
        for k in (REFERENCE, made)
    )
    whole = dict(plain[0].named_parameters())
    for name, module in packed[0].named_modules():
        if name.endswith("experts"):
            for part, matrix in zip(
                ("gate_up_proj", "down_proj"), module.packed.held[:2], strict=True
            ):
                blocks, scales = made["experts"].unpack(matrix)
                assert torch.equal(blocks, whole[f"{name}.{part}_blocks"])
                assert torch.equal(scales, whole[f"{name}.{part}_scales"])
                parameter = module.get_parameter(f"{part}_blocks")
                assert parameter.data_ptr() == matrix.codes.data_ptr()
    assert packed[1].bytes_held >= plain[1].bytes_held


def test_projections_are_joined_where_they_lie(folder):
    prepared = prepare(folder, "tp1", 1)
    model, _ = load_model(
        prepared, prepared.rank_plan(0), Groups.alone(CPU), torch.float32, CPU, kernels=modules()
    )
    attention = model.get_submodule("model.layers.0.self_attn")
    weight, bias = attention.qkv
    assert weight.data_ptr() == attention.q_proj.weight.data_ptr()
    assert bias.data_ptr() == attention.q_proj.bias.data_ptr()
    for joined, leaf in ((weight, "weight"), (bias, "bias")):
        parts = [getattr(attention, f"{x}_proj").get_parameter(leaf) for x in "qkv"]
        assert torch.equal(joined, torch.cat(parts))
