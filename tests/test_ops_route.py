"""route: the chosen experts, their order where logits are equal, and their weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tpx.ops.route import route

pytestmark = pytest.mark.usefixtures("both_ways")


def by_hand(logits, top_k):
    """Python's sort on (-logit, id), and the softmax over the first top_k."""
    ids = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
    sizes = [math.exp(logits[e] - logits[ids[0]]) for e in ids]
    return ids, [size / sum(sizes) for size in sizes]


def of_logits(logits, top_k, dtype=torch.float32):
    """route on one-dimensional tokens whose logits are these: the bias of token 0."""
    b_E = torch.tensor(logits, dtype=dtype)
    h_TD, w_ED = torch.zeros(1, 4, dtype=dtype), torch.ones(len(logits), 4, dtype=dtype)
    return route(h_TD, w_ED, b_E, top_k)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_the_largest_logits_win_and_the_lower_id_breaks_ties(logits, data):
    top_k = data.draw(st.integers(1, len(logits)))
    ids, weights = by_hand([float(x) for x in logits], top_k)
    got = of_logits([float(x) for x in logits], top_k)
    assert got.expert_ids_TK.tolist() == [ids]
    assert got.expert_ids_TK.dtype == torch.int64
    assert got.weights_TK[0].tolist() == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize("experts", [3, 16, 128])
def test_all_logits_equal_choose_the_first_experts(experts):
    got = of_logits([0.5] * experts, 3)
    assert got.expert_ids_TK.tolist() == [[0, 1, 2]]
    assert got.weights_TK[0].tolist() == pytest.approx([1 / 3] * 3)


def test_logits_are_the_tokens_times_the_weights_plus_the_bias():
    generator = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*s, generator=generator) for s in ((5, 8), (6, 8), (6,)))
    got = route(h, w, b, 2)
    for t in range(5):
        logits = [float(w[e].double() @ h[t].double() + b[e]) for e in range(6)]
        ids, weights = by_hand(logits, 2)
        assert got.expert_ids_TK[t].tolist() == ids
        assert got.weights_TK[t].tolist() == pytest.approx(weights, abs=1e-5)


def test_no_tokens_and_the_models_dtype():
    got = route(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(3), 2)
    assert got.expert_ids_TK.shape == got.weights_TK.shape == (0, 2)
    assert of_logits([1.0, 2.0], 2, torch.bfloat16).weights_TK.dtype == torch.bfloat16


def test_the_weights_have_a_gradient():
    h = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    got = route(h, torch.eye(4), torch.zeros(4), 2)
    assert got.weights_TK.sum(-1).tolist() == pytest.approx([1.0] * 3)
    got.weights_TK[:, 0].sum().backward()
    assert (h.grad != 0).sum(-1).tolist() == [2, 2, 2]  # the two chosen logits of each token
