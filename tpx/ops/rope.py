"""Rotary positions (arXiv 2104.09864) with YaRN (arXiv 2309.00071): the torch reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..families.spec import Rope
from .cpu import native


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians a position, [head_dim / 2] float32 on the CPU.

    YaRN, equation 23: dimensions that turn often keep theta's frequency, slow ones are divided by
    `factor`, between `beta_fast` and `beta_slow` turns in the original context it is a ramp.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    periods = torch.pow(rope.theta, exponents)
    if rope.factor == 1.0:
        return 1.0 / periods
    kept = 1 - _ramp(rope, head_dim)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _ramp(rope: Rope, head_dim: int) -> Tensor:
    """0 where a frequency is kept, 1 where it is divided, [head_dim / 2] float32."""
    low = _dimension_of(rope.beta_fast, rope, head_dim)
    high = _dimension_of(rope.beta_slow, rope, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    places = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    return ((places - low) / (high - low)).clamp(0, 1)


def _dimension_of(turns: float, rope: Rope, head_dim: int) -> float:
    """The (fractional) dimension that turns so many times in the original context."""
    positions_a_radian = rope.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(positions_a_radian) / (2 * math.log(rope.theta))


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by, so that attention is as sharp as before the stretch."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0


def rope_tables(
    positions_T: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, head_dim / 2], computed in float32 and then rounded to `dtype`."""
    angles = positions_T[:, None].float() * frequencies
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rope(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (d, d + D/2) of every head by its token's angle."""
    if (fast := native(x_THD, cos, sin)) is not None:
        return fast.rope(x_THD, cos, sin)
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
