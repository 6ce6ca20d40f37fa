"""Rotary positions with YaRN: published constants, the rotation as complex numbers, the limits."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from tpx.families.spec import Rope
from tpx.ops.rope import apply_rope, attention_factor, rope_frequencies, rope_tables

pytestmark = pytest.mark.usefixtures("both_ways")

GPT_OSS = Rope(150000.0, 32.0, 4096, 32.0, 1.0, truncate=False)


def plain(theta, head_dim):
    return [theta ** (-2 * d / head_dim) for d in range(head_dim // 2)]


def by_hand(rope, head_dim):
    """YaRN's ramp in Python's floats."""
    turns = (rope.beta_fast, rope.beta_slow)
    edges = [
        head_dim
        * math.log(rope.original_max_position_embeddings / (2 * math.pi * n))
        / (2 * math.log(rope.theta))
        for n in turns
    ]
    if rope.truncate:
        edges = [math.floor(edges[0]), math.ceil(edges[1])]
    low, high = max(edges[0], 0), min(edges[1], head_dim - 1)
    result = []
    for d, frequency in enumerate(plain(rope.theta, head_dim)):
        slow = min(max((d - low) / (high - low), 0), 1)
        result.append(frequency * (1 - slow) + frequency / rope.factor * slow)
    return result


def test_the_published_constants():
    assert attention_factor(GPT_OSS) == pytest.approx(1.3465735902799727)
    got = (rope_frequencies(GPT_OSS, 64) / torch.tensor(plain(150000.0, 64))).tolist()
    # The ramp runs from dimension 8.09 to 17.40 and is not rounded.
    assert got[:9] == pytest.approx([1.0] * 9, rel=1e-6)
    assert got[18:] == pytest.approx([1 / 32] * 14, rel=1e-6)
    ramp = [1 - (d - 8.0928) / (17.398 - 8.0928) * 31 / 32 for d in range(9, 18)]
    assert got[9:18] == pytest.approx(ramp, abs=2e-4)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64])
@pytest.mark.parametrize("original", [16, 128, 4096])
def test_frequencies_are_yarns(truncate, head_dim, original):
    rope = Rope(150000.0, 4.0, original, 32.0, 1.0, truncate=truncate)
    got = rope_frequencies(rope, head_dim)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(by_hand(rope, head_dim), rel=1e-5)


def test_factor_one_is_plain_rope():
    rope = Rope(10000.0)
    assert rope_frequencies(rope, 16).tolist() == pytest.approx(plain(10000.0, 16), rel=1e-6)
    assert attention_factor(rope) == 1.0


def test_a_ramp_of_no_width_is_a_step():
    rope = Rope(150000.0, 4.0, 1, 32.0, 1.0)  # both edges lie below 0
    assert rope_frequencies(rope, 16).isfinite().all()


def test_a_given_attention_factor_is_used():
    assert attention_factor(Rope(1e4, 8.0, 64, attention_factor=0.5)) == 0.5
    assert attention_factor(Rope(1e4, 8.0, 64)) == pytest.approx(0.1 * math.log(8) + 1)


def test_frequencies_are_real_numbers_also_where_a_model_is_built_without_memory():
    with torch.device("meta"):
        assert rope_frequencies(GPT_OSS, 64).device.type == "cpu"


def test_a_pair_turns_by_position_times_frequency():
    positions = torch.tensor([0, 1, 77, 131071])
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rope = Rope(150000.0, 4.0, 32)
    frequencies = rope_frequencies(rope, 8)
    got = apply_rope(x, *rope_tables(positions, frequencies, 1.25, torch.float32))
    for t, position in enumerate(positions.tolist()):
        for h in range(2):
            for d in range(4):
                # Angles are float32: the last position's is good to a few thousandths.
                angle = float(torch.tensor(float(position)) * frequencies[d])
                turned = complex(x[t, h, d], x[t, h, d + 4]) * cmath.rect(1.25, angle)
                assert got[t, h, d].item() == pytest.approx(turned.real, abs=1e-6)
                assert got[t, h, d + 4].item() == pytest.approx(turned.imag, abs=1e-6)


def test_tables_are_rounded_last_and_position_zero_only_scales():
    frequencies = rope_frequencies(GPT_OSS, 64)
    wide = rope_tables(torch.arange(50), frequencies, 1.3, torch.float32)
    narrow = rope_tables(torch.arange(50), frequencies, 1.3, torch.bfloat16)
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert set(wide[0][0].tolist()) == {torch.tensor(1.3).item()}
    assert not wide[1][0].any()


def test_no_tokens():
    tables = rope_tables(torch.arange(0), rope_frequencies(GPT_OSS, 8), 1.0, torch.float32)
    assert apply_rope(torch.ones(0, 3, 8), *tables).shape == (0, 3, 8)
