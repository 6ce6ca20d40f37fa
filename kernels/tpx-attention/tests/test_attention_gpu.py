"""On a GPU, at the shapes that ship: errors against float64, poisoned outputs, equal twice.

Bounds of the relative error |got - expected| / |expected|: bfloat16 results 4e-3 (one rounding of
the result is 1.7e-3, one of the weights of the softmax the same), float32 results of bfloat16
operands 1e-5, a float8 cache as bfloat16 (the reference reads the same cache).
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import angles, error, new_rows, paged
from tpx_attention import attention, configs, linear, reference
from tpx_attention.sample import launch_sample, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, F32, SHAPES = 4e-3, 1e-5, {"heads": 64, "kv": 8, "width": 64, "page": 16}


def poison():
    """Fills freed memory with NaN, so that an output that is not written shows."""
    torch.full((1 << 28,), torch.nan, device="cuda")


def twice(run):
    """The result of `run`, which must be the same bits again."""
    poison()
    first = run()
    poison()
    assert torch.equal(first.view(torch.uint8), run().view(torch.uint8))
    return first


def gpu_case(*args, **options):
    seed = int(torch.randint(1 << 30, ()).item())
    return paged(
        *args, **{**SHAPES, "dtype": torch.bfloat16, "device": "cuda", **options, "seed": seed}
    )


def expected_of(case):
    return reference.attention(
        case.q_THD.double(), case.k, case.v, *case.batch, case.sinks, case.window
    )


@pytest.mark.parametrize("terms", ["", "brn"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 16])
@pytest.mark.parametrize(("n", "k"), [(5120, 2880), (2880, 4096), (32, 2880), (1001, 700)])
def test_linear(n, k, rows, terms):
    def random(*shape):
        return torch.randn(shape, device="cuda").bfloat16()

    x, weight = random(rows, k), random(n, k) / k**0.5
    rest = [random(n), random(rows, n), random(k)] if terms else [None] * 3
    config = configs.linear(torch.cuda.get_device_name(), n, k, rows, bool(terms))
    for dtype, bound in ((torch.bfloat16, BF16), (torch.float32, F32)):
        got = twice(lambda d=dtype: linear.linear_decode(x, weight, *rest, 1e-5, d))
        wide_x = x.double()
        if terms:  # the norm's result is rounded to bfloat16 by definition
            norm = (
                rest[2].double()
                * wide_x
                * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + 1e-5)
            )
            wide_x = norm.bfloat16().double()
            bound = max(bound, 1e-3)  # where that rounding falls on either side
        want = wide_x @ weight.double().t()
        want = want + rest[0].double() + rest[1].double() if terms else want
        torch_rounds = config["kernel"] == "torch"
        assert error(got, want) < (BF16 if torch_rounds else bound)


def test_linear_head():
    x = torch.randn(2, 2880, device="cuda").bfloat16()
    weight = torch.randn(201088, 2880, device="cuda", dtype=torch.bfloat16)
    got = twice(lambda: linear.linear_decode(x, weight, out_dtype=torch.float32))
    assert error(got[:, -999:], x.double() @ weight[-999:].double().t()) < BF16
    assert error(got[:, :999], x.double() @ weight[:999].double().t()) < BF16


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("window", [None, 128], ids=str)
@pytest.mark.parametrize(
    "lengths", [[1], [127, 128, 129, 130], [8192], [5000, 1, 77, 2049, 300, 16, 17, 4096]], ids=str
)
def test_decode(lengths, window, cache_dtype):
    case = gpu_case([1] * len(lengths), lengths, window, cache_dtype=cache_dtype)
    want = expected_of(case)
    arguments = (case.q_THD, case.k, case.v, *case.lookup)
    assert error(twice(lambda: attention.decode_attention(*arguments)), want) < BF16
    assert error(twice(lambda: attention.decode_attention(*arguments, early=True)), want) < BF16


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("window", [None, 128], ids=str)
@pytest.mark.parametrize("lengths", [[1, 129, 2000], [8192]], ids=str)
def test_new_token(lengths, window, cache_dtype):
    case = gpu_case([1] * len(lengths), lengths, window, cache_dtype=cache_dtype)
    qkv = new_rows(case)
    turn = angles(len(lengths), 64, torch.bfloat16, "cuda")
    kept = case._replace(k=case.k.clone(), v=case.v.clone())
    got = twice(
        lambda: attention.rope_write_attention(qkv, *turn, case.slots, case.k, case.v, *case.lookup)
    )
    q = reference.rope_write(qkv, *turn, case.slots, kept.k, kept.v)
    assert error(got, expected_of(kept._replace(q_THD=q))) < BF16
    for mine, theirs in ((case.k, kept.k), (case.v, kept.v)):
        close = torch.isclose(mine.float(), theirs.float(), rtol=0.13, equal_nan=True)
        assert close.all()  # a fused multiply-add may round to the neighbour


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("window", [None, 128], ids=str)
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        pytest.param([1500], [1500], id="prefill"),
        pytest.param([512, 0, 33], [2560, 9, 1000], id="chunks"),
        pytest.param([1, 1, 700, 1, 129], [4000, 1, 700, 129, 129], id="mixed"),
    ],
)
def test_prefill(counts, lengths, window, cache_dtype):
    case = gpu_case(counts, lengths, window, cache_dtype=cache_dtype)
    got = twice(
        lambda: attention.prefill_attention(
            case.q_THD, case.k, case.v, *case.batch, case.sinks, window
        )
    )
    assert error(got, expected_of(case)) < BF16


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "warps"), [(1, 1, 1), (1, 8, 4), (4, 2, 2)])
def test_rope_write(tokens, heads, warps, cache_dtype):
    case = gpu_case([200, 3], [200, 50], cache_dtype=cache_dtype)
    config = {"tokens": tokens, "heads": heads, "warps": warps}
    qkv = torch.randn(203, 80 * 64, device="cuda").bfloat16()
    turn = angles(203, 64, torch.bfloat16, "cuda")
    kept = [case.k.clone(), case.v.clone()]
    written = case.slots, case.k, case.v
    got = twice(lambda: attention.launch_rope_write(qkv, *turn, *written, config))
    assert error(got, reference.rope_write(qkv.double(), *turn, case.slots, *kept)) < BF16
    k, v, right_k, right_v = (x.float() for x in (case.k, case.v, *kept))
    near = {torch.bfloat16: 0.01, torch.float8_e4m3fn: 0.13}[cache_dtype]
    assert torch.isclose(k, right_k, rtol=near, atol=2**-9, equal_nan=True).all()
    assert torch.equal(v.nan_to_num(), right_v.nan_to_num())


def test_decode_is_captured_once_for_every_length():
    case = gpu_case([1, 1], [4000, 4000])
    arguments = (case.q_THD, case.k, case.v, *case.lookup)
    attention.decode_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.decode_attention(*arguments)
    for lengths in ([1, 4000], [77, 2500]):
        case.lengths.copy_(torch.tensor(lengths))
        out.fill_(torch.nan)
        graph.replay()
        assert error(out, expected_of(case)) < BF16


def test_sample():
    rows = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 50, 1.0), (1.0, 0, 0.9), (1.2, 1000, 0.95)] * 4
    temperature, top_p = (torch.tensor([r[i] for r in rows]).double().cuda() for i in (0, 2))
    top_k = torch.tensor([r[1] for r in rows]).cuda()
    logits = torch.randn(len(rows), 201088, device="cuda") * 3
    u = torch.rand(len(rows), device="cuda", dtype=torch.float64)
    got = twice(lambda: sample(logits, temperature, top_k, top_p, u))
    assert torch.equal(got, reference.sample(logits, temperature, top_k, top_p, u))
    assert torch.equal(got, launch_sample(logits, temperature, top_k, top_p, u, True, True, 4096))
    none, whole = torch.zeros_like(top_k), torch.ones_like(top_p)
    for k, p, promise in (
        (none, whole, {"any_top_k": False, "any_top_p": False}),
        (top_k, whole, {"any_top_p": False}),
        (none, top_p, {"any_top_k": False}),
    ):
        got = sample(logits, temperature, k, p, u, **promise)
        assert torch.equal(got, reference.sample(logits, temperature, k, p, u))
