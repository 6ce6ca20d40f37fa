"""Bytes read once a node, packed and put in their places on a GPU; threads stand for ranks."""

from __future__ import annotations

import pytest
import torch
from byte_plans import drawn
from exchange_cases import check_drawn
from hypothesis import given, settings, strategies as st

pytestmark = pytest.mark.gpu


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda world: drawn(world, longest=3000)),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_any_plans_shards_are_filled_on_a_gpu(case, dtype):
    check_drawn(case, dtype, 1 << 30, "cuda")
