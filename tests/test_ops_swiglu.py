"""swiglu against the formula in Python's own floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from tpx.ops.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("both_ways")

ALPHA, LIMIT = 1.702, 7.0


def by_hand(gate, up):
    gate, up = min(gate, LIMIT), min(max(up, -LIMIT), LIMIT)
    return gate / (1 + math.exp(-ALPHA * gate)) * (up + 1)


@given(st.floats(-30, 30, width=32), st.floats(-30, 30, width=32))
def test_one_pair_is_the_formula(gate, up):
    got = swiglu(torch.tensor([[gate, up]]), ALPHA, LIMIT).item()
    assert got == pytest.approx(by_hand(gate, up), rel=1e-5, abs=1e-6)


def test_gate_and_up_are_interleaved():
    x = torch.arange(12, dtype=torch.float64).reshape(2, 6) / 4
    got = swiglu(x, ALPHA, LIMIT)
    assert got.shape == (2, 3)
    for r in range(2):
        pairs = [x[r, 2 * f : 2 * f + 2].tolist() for f in range(3)]
        assert got[r].tolist() == pytest.approx([by_hand(*pair) for pair in pairs], rel=1e-12)


def test_the_gate_has_no_lower_limit_and_up_has_both():
    x = torch.tensor([[9.0, 2.0], [7.0, 2.0], [3.0, 9.0], [3.0, 7.0], [3.0, -9.0], [3.0, -7.0]])
    got = swiglu(x, ALPHA, LIMIT)[:, 0]
    assert got[0] == got[1]
    assert got[2] == got[3]
    assert got[4] == got[5]
    # With a small alpha a gate below -limit still counts in full.
    assert swiglu(torch.tensor([[-20.0, 0.0]]), 0.0, LIMIT).item() == -10.0


def test_bfloat16_is_rounded_once():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(swiglu(x, ALPHA, LIMIT), swiglu(x.float(), ALPHA, LIMIT).bfloat16())


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)])
def test_no_rows_or_no_columns(shape):
    assert swiglu(torch.ones(shape), ALPHA, LIMIT).shape == (shape[0], shape[1] // 2)


def test_it_has_a_gradient():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 6, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: swiglu(y, ALPHA, LIMIT), x)
