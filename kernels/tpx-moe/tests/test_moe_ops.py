"""The operations as a caller sees them, where no kernel can run: registered, traceable, the
reference's numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from moe_numbers import distance, layer
from tpx_moe import (
    Packed,
    experts,
    experts_sorted,
    reduce,
    reduce_residual_norm,
    reference,
    residual_norm,
    route,
    route_experts,
    self_test,
)
from tpx_moe.api import _experts, _router
from tpx_moe.configs import FOLDER, parse, table

OPS = torch.ops.tpx_moe


def test_a_layer_step_by_step_equals_dense_matrices():
    case = layer(5, 64, 96, 4, 2, dtype=torch.float64)
    h, ids, weights = route(case.x, case.router)
    y = experts(h, ids, case.held)
    out, normed = reduce_residual_norm(y, ids, weights, case.x, case.router.norm_D)
    up, down = (reference.dequantize(m, torch.float64) for m in (case.held.gate_up, case.held.down))
    right = case.x.clone()
    for t in range(5):
        for k in range(2):
            e = ids[t, k]
            g = up[e] @ h[t] + case.held.gate_up_bias[e]
            gate, linear = g[0::2].clamp(max=7), g[1::2].clamp(-7, 7)
            z = down[e] @ (gate * (1.702 * gate).sigmoid() * (linear + 1)) + case.held.down_bias[e]
            right[t] += weights[t, k] * z
    assert distance(out, right) < 1e-6  # swiglu's constants are float32 at least
    assert distance(normed, reference.rms_norm(right, case.router.norm_D, 1e-5)) < 1e-6


def test_sorted_rows_give_what_pairs_give():
    case = layer(6, 64, 32, 3, 2)
    h, ids, _ = route(case.x, case.router)
    y = experts(h, ids, case.held)
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=3)
    padded = torch.cat([h[order // 2], torch.randn(2, 64)])
    found = experts_sorted(padded, counts, case.held)
    assert distance(found[:12], y[0][order]) < 1e-6
    assert not found[12:].any()


@pytest.mark.parametrize("norm", [False, True])
def test_routing_and_experts_together_give_what_they_give_one_by_one(norm):
    case = layer(3, 64, 32, 4, 2)
    router = case.router if norm else case.router._replace(norm_D=None)
    h, ids, weights = route(case.x, router)
    found = route_experts(case.x, router, case.held)
    for one, other in zip(found, (experts(h, ids, case.held), ids, weights), strict=True):
        assert torch.equal(one, other)


def test_partial_sums_of_two_ranks_add_up():
    slots = torch.tensor([0, -1, 1, -1])
    whole = layer(4, 64, 32, 4, 2)
    h, ids, weights = route(whole.x, whole.router)
    total = reduce(experts(h, ids, whole.held), ids, weights)
    parts = torch.zeros_like(total)
    for mine in (slots, torch.tensor([-1, 0, -1, 1])):
        here = (mine >= 0).nonzero().flatten()

        def of(m: Packed, here: torch.Tensor = here) -> Packed:
            return m._replace(codes=m.codes[here], scales=m.scales[here])

        held = whole.held._replace(
            gate_up=of(whole.held.gate_up),
            down=of(whole.held.down),
            gate_up_bias=whole.held.gate_up_bias[here],
            down_bias=whole.held.down_bias[here],
            slot_E=mine.int(),
        )
        y = experts(h, ids, held)
        y.view(8, 64)[(mine[ids.flatten().long()] < 0)] = float("nan")
        parts += reduce(y, ids, weights, held.slot_E)
    assert distance(parts, total) < 1e-6


def test_ops_are_registered_with_fakes():
    case = layer(3, 64, 32, 4, 2)
    _, ids, weights = route(case.x, case.router)
    y = experts(case.x, ids, case.held)
    norm = case.router.norm_D
    for op, arguments in (
        (OPS.route, (case.x, *_router(case.router))),
        (OPS.experts, (case.x, ids, *_experts(case.held))),
        (OPS.route_experts, (case.x, *_router(case.router), *_experts(case.held))),
        (OPS.experts_sorted, (case.x, torch.tensor([1, 1, 0, 1]), *_experts(case.held))),
        (OPS.reduce, (y, ids, weights, None, case.x, norm, 1e-5)),
        (OPS.residual_norm, (case.x, case.x, norm, 1e-5)),
        (OPS.residual_norm, (case.x, None, norm, 1e-5)),
    ):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_residual_norm_rounds_once():
    x, residual = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16)
    norm = torch.ones(8, dtype=torch.bfloat16)
    out, h = residual_norm(x, residual, norm)
    assert torch.equal(out, (x.double() + residual.double()).bfloat16())
    assert torch.equal(h, reference.rms_norm(out, norm, 1e-5))


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_of_configurations_hold_together(file):
    found = table((file.stem,), 2880)
    for ways in found:
        assert [way.upto for way in ways] == sorted(way.upto for way in ways)
        assert all(way.gate_up.split == 1 for way in ways)
    assert all(way.down.split == 1 for way in found.sorted)
    for way in found.decode:
        assert min(way.gate_up.tokens, way.down.tokens) >= way.upto > 0
        assert way.down.ahead.bit_count() <= 1
    assert found.few == 16  # in three launches and the sum
    assert found.way(found.few, 4, 32) == found.decode[-1]
    assert found.way(found.few + 1, 4, 32) == found.sorted[0]
    assert found.way(10**6, 4, 32) == found.sorted[-1]
    # float32 tiles of three stages of 256 tokens do not fit into a multiprocessor
    wide = found.way(10**6, 4, 32, itemsize=4)
    assert max(wide.gate_up.stages, wide.down.stages) <= 2
    assert wide.gate_up._replace(stages=found.sorted[-1].gate_up.stages) == found.sorted[-1].gate_up


def test_a_table_refuses_what_it_does_not_know():
    with pytest.raises(TypeError):
        parse({"decode": [{"upto": 1, "overlap": True, "gate_up": {"depth": 1}}], "sorted": []})


def test_without_a_device_the_self_test_asks_for_the_safe_way():
    assert self_test(torch.device("cpu"), 64, 32).safe


@pytest.mark.more
def test_the_package_needs_no_triton():
    script = (
        "import sys; sys.modules['triton'] = None; import torch, tpx_moe;"
        "x = torch.ones(1, 2); print(tpx_moe.residual_norm(x, x, x[0])[0].tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "[[2.0, 2.0]]\n", done.stderr
