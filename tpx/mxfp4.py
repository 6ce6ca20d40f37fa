"""The MXFP4 format (OCP Microscaling Formats v1.0): reference quantise and dequantise.

32 values along the last dimension share a power of two (E8M0); each is a 4-bit E2M1 number, two a
byte, the lower nibble first. Knows no kernel's layout and no model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 32  # values that share a scale
BIAS = 127  # of E8M0: byte s means 2**(s - 127), and 255 means NaN
NAN_SCALE = 255
# E2M1 by code: a sign bit, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_EMAX = 2  # exponent of the largest E2M1 number, 6 = 1.5 * 2**2


class Mxfp4(NamedTuple):
    """blocks [..., K/32, 16] uint8: value 2i of a block is the low nibble of byte i, value 2i+1 the
    high one. scales [..., K/32] uint8: E8M0."""

    blocks: Tensor
    scales: Tensor


def dequantize(weight: Mxfp4, dtype: torch.dtype) -> Tensor:
    """[..., K] in `dtype`: E2M1 code times 2**(scale - 127); scale 255 gives NaN.

    Exact in float64. In float32 and bfloat16 exact too, subnormals included (the smallest is
    2**-128), but for magnitudes of 2**128 and more, which only scales 253 and 254 reach: infinity.
    float16 is float32 rounded.
    """
    blocks, scales = weight
    exact = torch.float32 if dtype == torch.float16 else dtype
    codes = torch.tensor(E2M1, dtype=exact, device=blocks.device)
    pair_of_byte = torch.stack([codes.repeat(16), codes.repeat_interleave(16)], dim=-1)
    values = F.embedding(blocks.int(), pair_of_byte).flatten(-2)
    values.mul_(power_of_two(scales, exact).unsqueeze(-1))  # in place: one copy at a time
    return values.flatten(-2).to(dtype)


def quantize(x: Tensor, scales: Tensor | None = None) -> Mxfp4:
    """Packs x [..., K], K a multiple of 32.

    Scale (OCP MX v1.0, section 6.3): 2**(floor(log2(largest magnitude)) - 2), held to E8M0's range,
    so a block of zeros gets byte 0. `scales` [..., K/32] uint8 are used instead where given.
    Values are rounded to the nearest E2M1 number, ties to the even code, and saturate at 6. A block
    that holds NaN or infinity gets scale 255 and codes 0: all of it reads as NaN.
    """
    assert x.shape[-1] % BLOCK == 0, f"{x.shape[-1]} values are no whole blocks of {BLOCK}"
    x = x if x.dtype == torch.float64 else x.float()
    values = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    if scales is None:
        scales = scales_of(values)
    broken = ~values.isfinite().all(-1) | (scales == NAN_SCALE)
    scales = scales.masked_fill(broken, NAN_SCALE)
    factor = power_of_two(scales, x.dtype).masked_fill(broken, 1.0)
    codes = nearest_e2m1(values / factor.unsqueeze(-1)).masked_fill(broken.unsqueeze(-1), 0)
    return Mxfp4(codes[..., 0::2] | codes[..., 1::2] << 4, scales)


def scales_of(values: Tensor) -> Tensor:
    """E8M0 bytes [..., B] for blocks [..., B, 32], by the rule in quantize."""
    _, exponent = torch.frexp(
        values.abs().amax(-1)
    )  # magnitude = mantissa in [1/2, 1) * 2**exponent
    byte = (exponent - 1 - E2M1_EMAX + BIAS).clamp(0, NAN_SCALE - 1)
    return byte.masked_fill((values == 0).all(-1), 0).to(torch.uint8)


def nearest_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes (uint8) of x, which holds no NaN. torch.round takes ties to even, and in each of
    the three ranges a code is even where the rounded number is."""
    size = x.abs()
    small, middle, large = (2 * size).round(), size.round() + 2, (size / 2).round() + 4
    code = torch.where(size < 2, small, torch.where(size < 4, middle, large)).clamp(max=7)
    return code.to(torch.uint8) | x.signbit().to(torch.uint8) << 3


def power_of_two(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that E8M0 bytes stand for, exactly."""
    return scales.view(torch.float8_e8m0fnu).to(dtype)
