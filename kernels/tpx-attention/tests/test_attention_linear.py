"""Linear kernels under triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from attention_cases import error
from tpx_attention import configs, linear, reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

GEMV = {"kernel": "gemv", "block_n": 4, "block_k": 32, "warps": 1}
SKINNY = {"kernel": "skinny", "block_n": 16, "block_k": 16, "splits": 1, "warps": 1, "stages": 1}


def inputs(rows, n, k, dtype=torch.float32, terms="brn"):
    """x, weight, and those of bias, residual and norm that `terms` names."""
    make = torch.Generator().manual_seed(rows * 100 + n)

    def random(*shape):
        return torch.randn(*shape, generator=make).to(dtype)

    weight = random(n, k) / k**0.5
    chosen = {"b": random(n), "r": random(rows, n), "n": random(k)}
    return random(rows, k), weight, [chosen[t] if t in terms else None for t in "brn"]


@pytest.mark.parametrize("terms", ["", "br", "brn"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 10, 64), (3, 7, 90), (4, 1, 33)])
def test_gemv(rows, n, k, terms):
    x, weight, rest = inputs(rows, n, k, terms=terms)
    got = linear.launch(x, weight, *rest, 1e-5, None, GEMV)
    assert error(got, reference.linear_decode(x, weight, *rest)) < 1e-6


@pytest.mark.parametrize("terms", ["", "brn"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("rows", "n", "k"), [(5, 20, 64), (16, 33, 72)])
def test_skinny(rows, n, k, splits, terms):
    x, weight, rest = inputs(rows, n, k, terms=terms)
    got = linear.launch(x, weight, *rest, 1e-5, None, {**SKINNY, "splits": splits})
    assert error(got, reference.linear_decode(x, weight, *rest)) < 1e-6


@pytest.mark.parametrize("config", [GEMV, SKINNY], ids=lambda c: c["kernel"])
def test_half_in_and_float32_out(config):
    x, weight, rest = inputs(2, 12, 64, torch.float16)
    got = linear.launch(x, weight, *rest, 1e-5, torch.float32, config)
    assert got.dtype == torch.float32
    assert error(got, reference.linear_decode(x, weight, *rest, out_dtype=torch.float32)) < 1e-4


def test_by_torch_is_the_same_function():
    x, weight, rest = inputs(6, 12, 64)
    got = linear.by_torch(x, weight, *rest, 1e-5, None)
    assert error(got, reference.linear_decode(x, weight, *rest)) < 1e-6


def test_no_rows():
    x, weight, _ = inputs(0, 12, 64)
    assert linear.launch(x, weight, None, None, None, 1e-5, None, GEMV).shape == (0, 12)


def test_tables_name_a_kernel_for_every_row_count():
    for device in ("default", "NVIDIA H100 80GB HBM3"):
        for n, k in ((5120, 2880), (2880, 4096), (32, 2880), (201088, 2880), (77, 99)):
            for rows in range(1, 17):
                assert configs.linear(device, n, k, rows)["kernel"] in ("gemv", "skinny", "torch")
            assert configs.linear(device, n, k, 17) is None
    assert configs.table("another device") == configs.table("default")


def test_gemv_steps_aside_where_k_does_not_fit_its_registers():
    config = {**GEMV, "block_n": 4, "block_k": 1024, "warps": 4}
    assert linear._fits(config, 4096, (7, 5))
    assert not linear._fits(config, 4097, (9, 0))


def test_skinny_steps_aside_where_triton_has_no_matrix_units():
    assert linear._fits(SKINNY, 2880, (8, 0))
    assert not linear._fits(SKINNY, 2880, (7, 5))
