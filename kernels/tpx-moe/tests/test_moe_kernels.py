"""Every kernel under triton's interpreter against the reference, at small and odd shapes; outputs
are NaN first. Without assembly, in float32 and float16: the interpreter is exact in these."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch
from moe_numbers import Layer, checkpoint, distance, layer
from torch import Tensor
from tpx_moe import pack, reference
from tpx_moe.configs import Tile, Way
from tpx_moe.device import Mode

launch = pytest.importorskip("tpx_moe.launch", reason="needs triton")
routing = pytest.importorskip("tpx_moe.routing", reason="needs triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # sigmoid of -100 is 0
]

PLAIN = Mode(asm=False, dependent=False)
TILE = Tile(64, 8, 1, 1, 2, 1, parted=True, halvings=0)
WAY = Way(False, 0, False, TILE, TILE)
SORTED_WAY = WAY._replace(sorted=True)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(monkeypatch, request):
    """Each test's own numbers, the same in every run, and NaN wherever a buffer is not written."""
    torch.manual_seed(crc32(request.node.name.encode()))

    def new_empty(self: Tensor, *shape, dtype=None, **_):
        dtype = dtype or self.dtype
        shape = shape[0] if isinstance(shape[0], torch.Size) else shape
        return self.new_full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


def routed(case: Layer) -> tuple[Tensor, routing.Chosen]:
    r = case.router
    return routing.route(case.x, routing.Router(r.norm_D, r.w_ED, r.b_E, r.top_k, r.eps), PLAIN)


def held(case: Layer) -> launch.Held:
    h = case.held
    return launch.Held(h.gate_up, h.down, h.gate_up_bias, h.down_bias, h.slot_E, h.alpha, h.limit)


def run(case: Layer, way: Way) -> Tensor:
    """out_TD, all kernels in a row; of few tokens also with the experts chosen by the matrices'
    kernels, which changes no bit."""
    h, chosen = routed(case)
    y = launch.experts(h, chosen, held(case), way, PLAIN)
    out = launch.reduce(y, chosen, case.held.slot_E, case.x, None, 0.0, False)[0]
    if len(case.x) and not way.sorted and case.held.gate_up.codes.numel():
        r = case.router
        router = routing.Router(r.norm_D, r.w_ED, r.b_E, r.top_k, r.eps)
        y, found = launch.route_experts(case.x, router, held(case), way, PLAIN)
        assert torch.equal(found.ids, chosen.ids)
        assert torch.equal(found.weights, chosen.weights)
        again = launch.reduce(y, found, case.held.slot_E, case.x, None, 0.0, False)[0]
        torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
    return out


def right(case: Layer) -> Tensor:
    r = case.router
    h, ids, weights = reference.route(case.x, r.norm_D, r.w_ED, r.b_E, r.top_k, r.eps)
    y = reference.experts(h, ids, *held(case))
    return reference.reduce(y, ids, weights, case.held.slot_E, case.x, None, 0.0)[0]


def ways(**tile: object) -> Way:
    down = TILE._replace(**tile)
    return Way(False, 0, False, down._replace(split=1), down)


def many(**tile: object) -> Way:
    return ways(**tile)._replace(sorted=True)


DECODE = {
    "one token": ((1, 64, 32, 8, 4), ways()),
    "a tail of 32 columns in both": ((1, 96, 96, 2, 1), ways(split=2)),
    "one dot a granule": ((3, 64, 64, 2, 1), ways(parted=False)),
    "a tile of 32 rows": ((1, 64, 32, 2, 1), ways(rows=32)),
    "a tile of 128 rows, of which half exist": ((1, 64, 32, 2, 1), ways(rows=128)),
    "one granule a step": ((1, 192, 32, 2, 1), ways(granules=1)),
    "four granules a step": ((1, 192, 32, 2, 1), ways(granules=4)),
    "one token of every expert": ((1, 64, 32, 2, 2), ways()),
    "every expert of every token": ((5, 64, 32, 2, 2), ways()),
    "a tile of more tokens than there are": ((8, 64, 32, 1, 1), ways(tokens=16)),
    "sixteen tokens": ((16, 64, 32, 2, 1), ways(tokens=16)),
}
DECODE_MORE = {
    "several steps in parts": ((2, 320, 320, 2, 1), ways(split=2)),
    "a shard of 23 blocks": ((2, 64, 736, 2, 1), ways(split=4)),
    "a shard of 22 blocks": ((2, 64, 704, 2, 1), ways(split=3)),
}


SORTED = {
    "several blocks of a hot expert": ((18, 64, 32, 2, 1), many(parted=False)),
    "half tiles": ((17, 64, 32, 2, 1), many(tokens=16, halvings=1, parted=False)),
    "quarters of a tile": ((20, 64, 32, 1, 1), many(tokens=16, halvings=2, parted=False)),
}
SORTED_MORE = {
    "experts without a token": ((17, 64, 32, 40, 1), many()),
    "many of everything": ((34, 192, 160, 5, 3), many(tokens=16, halvings=1)),
}


@pytest.mark.parametrize("name", DECODE)
def test_few_tokens(name):
    agree(*DECODE[name])


@pytest.mark.more
@pytest.mark.parametrize("name", DECODE_MORE)
def test_few_tokens_at_length(name):
    agree(*DECODE_MORE[name])


@pytest.mark.parametrize("name", SORTED)
def test_many_tokens(name):
    agree(*SORTED[name])


@pytest.mark.soak
@pytest.mark.parametrize("name", SORTED_MORE)
def test_many_tokens_at_length(name):
    agree(*SORTED_MORE[name])


def agree(shape: tuple[int, int, int, int, int], way: Way) -> None:
    case = layer(*shape)
    assert distance(run(case, way), right(case)) < 2e-6


@pytest.mark.parametrize("tokens", [2, pytest.param(18, marks=pytest.mark.more)])
def test_experts_elsewhere_count_as_zeros_and_are_not_read(tokens):
    slots = torch.tensor([-1, 1, 0, -1, -1])
    case = layer(tokens, 64, 32, 5, 1, slots=slots)
    assert distance(run(case, WAY if tokens <= 8 else SORTED_WAY), right(case)) < 2e-6


def test_a_rank_without_experts_adds_nothing():
    case = layer(2, 64, 32, 3, 2, slots=torch.tensor([-1, -1, -1]))
    assert torch.equal(run(case, WAY), case.x)


@pytest.mark.parametrize("down_bias", [False, True])
def test_a_rank_without_units_adds_the_bias_at_most(down_bias):
    case = layer(1, 64, 0, 2, 1, down_bias=down_bias)
    found = run(case, WAY)
    assert distance(found, right(case)) < 2e-6
    assert torch.equal(found, case.x) == (not down_bias)


@pytest.mark.parametrize("low", [0, 1])
def test_scales_that_cannot_be_folded_are_exact(low):
    case = layer(1, 64, 32, 1, 1, scales=(low, 132))
    assert case.held.gate_up.exact
    assert case.held.down.exact
    assert distance(run(case, WAY), right(case)) < 2e-6


def test_a_nan_scale_reaches_its_rows_alone():
    case = layer(1, 64, 64, 1, 1)
    blocks, bytes_ = checkpoint(1, 64, 64)
    bytes_[0, 5, 1] = 255
    case = case._replace(held=case.held._replace(down=pack(blocks, bytes_, False)))
    found = run(case, WAY)
    assert found.isnan().nonzero().tolist() == [[0, 5]]


def test_float16():
    case = layer(2, 64, 32, 1, 1, dtype=torch.float16, scales=(118, 122))
    assert distance(run(case, WAY), right(case)) < 2e-3


@pytest.mark.parametrize("tokens", [1, 18])
@pytest.mark.parametrize("norm", [False, True])
def test_route(tokens, norm, monkeypatch):
    monkeypatch.setattr(routing, "FEW_TOKENS", 16)
    case = layer(tokens, 96, 0, 5, 3)
    if not norm:
        case = case._replace(router=case.router._replace(norm_D=None))
    h, chosen = routed(case)
    r = case.router
    expected = reference.route(case.x, r.norm_D, r.w_ED, r.b_E, r.top_k, r.eps)
    assert distance(h, expected[0]) < 1e-6
    assert torch.equal(chosen.ids, expected[1])
    assert distance(chosen.weights, expected[2]) < 1e-6


@pytest.mark.parametrize("strip", [(32, 64, 1, 1), (16, 32, 1, 1)])
def test_route_in_other_strips(strip, monkeypatch):
    monkeypatch.setattr(routing, "FEW_TOKENS", 16)
    case = layer(35, 96, 0, 5, 3)
    r = case.router
    router = routing.Router(r.norm_D, r.w_ED, r.b_E, r.top_k, r.eps)
    h, chosen = routing.route(case.x, router, PLAIN, routing.Strip(*strip))
    expected = reference.route(case.x, r.norm_D, r.w_ED, r.b_E, r.top_k, r.eps)
    assert distance(h, expected[0]) < 1e-6
    assert torch.equal(chosen.ids, expected[1])
    assert distance(chosen.weights, expected[2]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [2, 18])
def test_of_equal_logits_the_lower_expert_comes_first(dtype, tokens, monkeypatch):
    monkeypatch.setattr(routing, "FEW_TOKENS", 16)
    case = layer(tokens, 64, 0, 6, 4, dtype=dtype)
    bias = torch.tensor([1.0, -0.0, 2.0, 2.0, 0.0, 2.0], dtype=dtype)
    router = case.router._replace(w_ED=torch.zeros(6, 64, dtype=dtype), b_E=bias)
    _, chosen = routed(case._replace(router=router))
    assert chosen.ids.tolist() == [[2, 3, 5, 0]] * tokens


def test_sort_keeps_the_order_of_pairs():
    ids = torch.tensor([[3, 0], [1, 3], [0, 2], [3, 1]], dtype=torch.int32)
    slots = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    order, starts = routing.sort(ids, slots, 3, False)
    assert starts.tolist() == [0, 1, 4, 6]
    assert order[:6].tolist() == [5, 0, 3, 6, 1, 4]


@pytest.mark.parametrize("sizes", [(8, 8, 1, 1), (16, 4, 2, 1), (32, 2, 5, 1), (8, 32, 3, 1)])
def test_sort_in_several_steps_and_parts(sizes):
    ids = torch.randint(0, 3, (13, 2), dtype=torch.int32)
    order, starts = routing.sort(ids, None, 3, False, routing.Sort(*sizes))
    assert torch.equal(order.long(), ids.flatten().argsort(stable=True))
    assert starts.tolist() == [0, *ids.flatten().bincount(minlength=3).cumsum(0).tolist()]


def test_rows_sorted_already():
    case = layer(7, 64, 32, 3, 1)
    counts = torch.tensor([2, 0, 3])
    found = launch.experts_sorted(case.x, counts, held(case), SORTED_WAY, PLAIN)
    expected = reference.experts_sorted(case.x, counts, *held(case))
    assert distance(found, expected) < 2e-6
    assert not found[5:].any()


def test_residual_and_norm():
    case = layer(3, 96, 0, 2, 1)
    x = torch.randn(3, 96)
    norm = case.router.norm_D
    for residual in (case.x, None):
        found = launch.residual_norm(x, residual, norm, 1e-5, False)
        expected = reference.residual_norm(x, residual, norm, 1e-5)
        assert distance(found[0], expected[0]) < 1e-6
        assert distance(found[1], expected[1]) < 1e-6


def test_inputs_that_are_not_contiguous():
    case = layer(3, 64, 32, 3, 2)
    other = case._replace(x=case.x.t().contiguous().t())
    assert torch.equal(run(other, WAY), run(case, WAY))


def test_nobody_has_a_token():
    case = layer(0, 64, 32, 3, 2)
    assert run(case, WAY).shape == (0, 64)
