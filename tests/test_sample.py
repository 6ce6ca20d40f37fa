"""ops/sample.py: which tokens stay, how often each is drawn, and what a draw depends on."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from tpx.ops.sample import inverse_cdf, probabilities, sample, uniform


def column(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


def distribution(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[float]:
    row = torch.tensor([logits], dtype=torch.float32)
    k = column(top_k, torch.int64)
    return probabilities(row, column(temperature), k, column(top_p))[0].tolist()


def draw(logits: torch.Tensor, u: float, temperature: float = 1.0) -> int:
    k, p = column(0, torch.int64), column(1.0)
    return int(sample(logits[None], column(temperature), k, p, column(u)))


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.05, 0.2, 0.25)]


def test_uniform_is_the_top_53_bits_of_a_hash_of_seed_and_position():
    text = (7).to_bytes(8, "little") + (3).to_bytes(8, "little")
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    assert uniform(7, 3) == (word >> 11) / 2**53
    assert uniform(2**64 - 1, 0) != uniform(2**64 - 1, 1) != uniform(0, 1)


def test_uniform_is_uniform_over_positions_and_over_seeds():
    by_position = [uniform(11, position) for position in range(20000)]
    by_seed = [uniform(seed, 11) for seed in range(20000)]
    assert stats.kstest(by_position, "uniform").pvalue > 1e-3
    assert stats.kstest(by_seed, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(by_position[:-1], by_position[1:])[0, 1]) < 0.03


def test_top_k_keeps_the_k_likeliest():
    kept = distribution(LOGITS, top_k=2)
    assert kept == pytest.approx([0, 0.4 / 0.65, 0, 0, 0.25 / 0.65])


@pytest.mark.parametrize("top_k", [0, 5, 6, 1000])
def test_top_k_of_zero_or_of_the_whole_vocabulary_keeps_all(top_k):
    assert distribution(LOGITS, top_k=top_k) == pytest.approx([0.1, 0.4, 0.05, 0.2, 0.25])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 4]),
        (0.64, [1, 4]),
        (0.66, [1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_likeliest_up_to_the_one_that_reaches_it(top_p, kept):
    p = distribution(LOGITS, top_p=top_p)
    assert [i for i, value in enumerate(p) if value > 0] == kept
    assert sum(p) == pytest.approx(1)


def test_top_p_counts_within_what_temperature_and_top_k_left():
    # top-k leaves 0.4, 0.25, 0.2; of their sum the first two are 0.7647
    assert [p > 0 for p in distribution(LOGITS, top_k=3, top_p=0.77)] == [0, 1, 0, 1, 1]
    assert [p > 0 for p in distribution(LOGITS, top_k=3, top_p=0.76)] == [0, 1, 0, 0, 1]
    flat = distribution(LOGITS, temperature=1e6, top_p=0.5)
    assert sum(p > 0 for p in flat) == 3


def test_of_equal_tokens_the_lower_id_stays():
    assert [p > 0 for p in distribution([1.0] * 6, top_k=4)] == [1, 1, 1, 1, 0, 0]
    assert [p > 0 for p in distribution([0.0, 2.0, 2.0, 2.0], top_k=2)] == [0, 1, 1, 0]
    assert [p > 0 for p in distribution([1.0] * 4, top_p=0.5)] == [1, 1, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=1, max_size=12),
    temperature=st.sampled_from([1e-12, 0.3, 1.0, 5.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([1e-9, 0.2, 0.5, 0.9, 1.0]),
)
def test_kept_tokens_follow_the_rule_written_out(logits, temperature, top_k, top_p):
    scores = [(logit - max(logits)) / temperature for logit in logits]
    weights = [math.exp(score) for score in scores]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: top_k or None]
    total, before, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if before / total < top_p - 1e-12 or top_p == 1:
            kept.append(i)
        before += weights[i]
    kept_sum = sum(weights[i] for i in kept)
    expected = [weights[i] / kept_sum if i in kept else 0 for i in range(len(logits))]
    assert distribution(logits, temperature, top_k, top_p) == pytest.approx(expected, abs=1e-9)


def test_greedy_takes_the_likeliest_and_of_equal_ones_the_first():
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert draw(logits, u=0.99, temperature=0) == 1


def test_a_tiny_temperature_is_greedy_and_no_nan():
    assert draw(torch.tensor([1.0, 2.0, 1.5]), u=0.999, temperature=5e-324) == 1


def test_draws_follow_the_inverse_of_the_cumulative_distribution_in_order_of_ids():
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    found = [int(inverse_cdf(p, column(u))) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)]
    assert found == [0, 0, 2, 2, 3, 3]


def test_a_batch_draws_each_row_as_alone():
    torch.manual_seed(1)
    logits = torch.randn(5, 40)
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    top_k = torch.tensor([0, 0, 7, 3, 5])
    top_p = torch.tensor([1.0, 0.9, 1.0, 0.5, 0.5], dtype=torch.float64)
    u = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    values = (logits, temperature, top_k, top_p, u)
    alone = [int(sample(*(value[i : i + 1] for value in values))) for i in range(5)]
    assert sample(*values).tolist() == alone


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    kept = p > 0
    assert counts[~kept].sum() == 0
    return stats.chisquare(counts[kept], p[kept] * counts.sum()).pvalue


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 12, 1), (1.3, 0, 0.8)]
)
def test_draws_are_distributed_as_the_softmax_says(temperature, top_k, top_p):
    torch.manual_seed(2)
    logits = torch.randn(1, 30)
    draws = 20000
    u = torch.tensor([uniform(5, position) for position in range(draws)], dtype=torch.float64)
    settings_ = column(temperature), column(top_k, torch.int64), column(top_p)
    p = probabilities(logits, *settings_)
    ids = inverse_cdf(p.expand(draws, -1), u)
    counts = np.bincount(ids.numpy(), minlength=30)
    weights = np.exp(logits[0].double().numpy() / temperature)
    keep = np.argsort(-weights)[: top_k or 30]
    share = np.cumsum(weights[keep]) / weights[keep].sum()
    keep = keep[: int(np.searchsorted(share, top_p - 1e-12)) + 1]
    expected = np.zeros(30)
    expected[keep] = weights[keep] / weights[keep].sum()
    assert chi_square(counts, expected) > 1e-3
    assert chi_square(np.roll(counts[keep], 1), expected[keep]) < 1e-6  # the test can fail
