"""On a device, at shapes that ship: against float64, fresh numbers each time, outputs NaN first,
the same bits from run to run and with both ways of unpacking."""

from __future__ import annotations

import pytest
import torch
from moe_numbers import Layer, distance, layer
from torch import Tensor
from tpx_moe import (
    experts,
    experts_sorted,
    reduce_residual_norm,
    reference,
    route,
    route_experts,
    self_test,
)

pytestmark = pytest.mark.gpu

# Of y, relative to float64 of the same inputs: bfloat16 rounds h once, and y once where tokens are
# many; each costs at most 2**-9 a number, and far less in the norm.
BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
TOKENS = [*range(1, 18), 64, 200, 300, 700]


@pytest.fixture(scope="module")
def wide() -> Layer:
    return layer(300, 2880, 2880, 8, 4, torch.bfloat16, "cuda")


def poison() -> None:
    """Memory that the next tensors get is full of NaN."""
    torch.full((1 << 27,), float("nan"), device="cuda")


def exact(case: Layer, h: Tensor, ids: Tensor) -> Tensor:
    """y [N, D] in float64."""
    held, top_k = case.held, ids.shape[1]
    slots = ids if held.slot_E is None else held.slot_E[ids.long()]
    y = torch.zeros(ids.numel(), held.down.rows, device="cuda", dtype=torch.float64)
    for e in range(len(held.gate_up.codes)):
        pair = (slots.flatten() == e).nonzero().flatten()
        up, down = (
            reference.dequantize(reference._expert(m, e), torch.float64)[0]
            for m in (held.gate_up, held.down)
        )
        g = h[pair // top_k].double() @ up.T + held.gate_up_bias[e].double()
        gate, linear = g[:, 0::2].clamp(max=held.limit), g[:, 1::2].clamp(-held.limit, held.limit)
        z = (gate * (held.alpha * gate).sigmoid() * (linear + 1)) @ down.T
        y[pair] = z if held.down_bias is None else z + held.down_bias[e].double()
    return y


def check(case: Layer, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x = torch.randn(tokens, case.x.shape[1], device="cuda", dtype=dtype)
    h, ids, weights = route(x, case.router)
    r = case.router
    right_h = reference.rms_norm(x.double(), r.norm_D.double(), r.eps)
    assert distance(h, right_h) < BOUND[dtype]
    logits = h.double() @ r.w_ED.double().T + r.b_E.double()
    chosen = logits.gather(1, ids.long())
    least = logits.sort(1)[0][:, -r.top_k]
    assert (chosen[:, -1] >= least - 2**-7 * logits.abs().amax(1)).all()  # as rounding may swap
    # Logits are rounded once to x's dtype, which moves weights' logarithms; so are weights, whose
    # smallest lie a fixed step apart.
    about = torch.finfo(x.dtype)
    unit = max(about.eps / 2, 4e-6)
    right = chosen.softmax(1)
    far = (unit * (2 * chosen.abs().amax(1, keepdim=True) + 1)).exp() - 1
    least = about.smallest_normal * about.eps / 2
    assert ((weights.double() - right).abs() <= right * far + least).all()
    poison()
    y = experts(h, ids, case.held)
    here = ids.flatten() >= 0
    if case.held.slot_E is not None:
        here = case.held.slot_E[ids.flatten().long()] >= 0
    right = exact(case, h, ids)
    assert distance(y.double().sum(0)[here], right[here]) < BOUND[dtype]
    assert torch.equal(experts(h, ids, case.held)[:, here], y[:, here])
    together = route_experts(x, case.router, case.held)
    assert torch.equal(together[0][:, here], y[:, here])
    assert torch.equal(together[1], ids)
    assert torch.equal(together[2], weights)
    plain = experts(h, ids, case.held._replace(safe=True))
    assert torch.equal(plain[:, here], y[:, here])
    poison()
    out, normed = reduce_residual_norm(y, ids, weights, x, r.norm_D, r.eps, case.held.slot_E)
    parts = (right * here.unsqueeze(1)).view(tokens, r.top_k, -1)
    expected = x.double() + (weights.double().unsqueeze(-1) * parts).sum(1)
    assert distance(out, expected) < BOUND[dtype]
    assert distance(normed, reference.rms_norm(expected, r.norm_D.double(), r.eps)) < 2e-2


@pytest.mark.parametrize("tokens", TOKENS)
def test_gpt_oss(wide, tokens):
    check(wide, tokens)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("units", [736, 704])
def test_uneven_shards(units, tokens):
    check(layer(1, 2880, units, 4, 2, torch.bfloat16, "cuda", down_bias=False), tokens)


@pytest.mark.parametrize("tokens", [1, 8, 16, 100])
def test_experts_elsewhere(tokens):
    slots = torch.full((128,), -1)
    slots[torch.randperm(128)[:16]] = torch.arange(16)
    check(layer(1, 2880, 320, 128, 4, torch.bfloat16, "cuda", slots), tokens)


@pytest.mark.parametrize("tokens", [2, 30])
def test_scales_beyond_the_usual(tokens):
    check(layer(1, 512, 256, 4, 2, torch.bfloat16, "cuda", scales=(114, 130)), tokens)
    zeros = layer(1, 512, 256, 4, 2, torch.bfloat16, "cuda")
    zeros.held.gate_up.scales.zero_()
    check(
        zeros._replace(held=zeros.held._replace(gate_up=zeros.held.gate_up._replace(exact=True))),
        tokens,
    )


@pytest.mark.parametrize("tokens", [3, 50])
def test_float16(tokens):
    check(
        layer(1, 1024, 512, 4, 2, torch.float16, "cuda", scales=(118, 121)), tokens, torch.float16
    )


@pytest.mark.parametrize("tokens", [3, 700])
def test_float32(tokens):
    """Also in the largest tiles, which are twice as large as with numbers of two bytes."""
    check(layer(1, 2880, 2880, 8, 4, torch.float32, "cuda"), tokens, torch.float32)


def test_one_hot_expert_and_rows_sorted_already(wide):
    h = torch.randn(90, 2880, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([0, 0, 70, 0, 1, 0, 0, 12], device="cuda")
    poison()
    found = experts_sorted(h, counts, wide.held)
    ids = torch.tensor([2] * 70 + [4] + [7] * 12, device="cuda", dtype=torch.int32).unsqueeze(1)
    assert distance(found[:83], exact(wide, h[:83], ids)) < BOUND[torch.bfloat16]
    assert not found[83:].any()


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_a_graph_holds_a_layer_and_follows_its_inputs(wide, tokens):
    x = torch.randn(tokens, 2880, device="cuda", dtype=torch.bfloat16)

    def run() -> tuple[Tensor, Tensor]:
        y, ids, weights = route_experts(x, wide.router, wide.held)
        return reduce_residual_norm(y, ids, weights, x, wide.router.norm_D)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for found, right in zip(held, run(), strict=True):
            assert torch.equal(found, right)


def test_the_self_test_finds_the_fast_way_right():
    for units, *routing in ((2880, 4, 32, 32), (736, 4, 32, 8), (2880, 4, 128, 3)):
        asked = torch.device("cuda"), 2880, units, torch.bfloat16, *routing
        assert not self_test(*asked).safe
