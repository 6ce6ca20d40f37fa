"""rms_norm against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from tpx.ops.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("both_ways")

EPS = 1e-5


def by_hand(x, weight):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_row_is_divided_by_its_root_mean_square():
    for size in (1e-4, 1.0, 1e4):
        x, weight = size * random(7, 96), random(96, seed=1)
        got = rms_norm(x, weight, EPS)
        torch.testing.assert_close(got.double(), by_hand(x, weight), rtol=1e-5, atol=1e-7)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x, weight = random(50, 64).bfloat16(), random(64, seed=1).bfloat16()
    got = rms_norm(x, weight, EPS)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rms_norm(x.float(), weight.float(), EPS).bfloat16())
    # A weight kept in float32 beside bfloat16 activations does not widen the output.
    assert rms_norm(x, weight.float(), EPS).dtype == torch.bfloat16


def test_zeros_stay_zeros_and_no_rows_is_no_rows():
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).any()
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), EPS).shape == (0, 8)


def test_it_has_a_gradient():
    x = random(3, 6).double().requires_grad_()
    weight = random(6, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, EPS), (x, weight))
