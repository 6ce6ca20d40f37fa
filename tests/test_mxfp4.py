"""MXFP4 against an oracle in pure Python: every byte, edge exponents, rounding, special values."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tpx.mxfp4 import BLOCK, Mxfp4, dequantize, quantize

torch.set_num_threads(1)
EDGES = (0, 1, 126, 127, 128, 252, 253, 254)
MAGNITUDES = [Fraction(0), Fraction(1, 2), Fraction(1), Fraction(3, 2)] + [
    Fraction(n) for n in (2, 3, 4, 6)
]


def oracle_value(code: int, scale: int) -> float:
    """The exact number, as a float64; built from the format's bits."""
    size = float(MAGNITUDES[code & 7] * Fraction(2) ** (scale - 127))
    return -size if code & 8 else size


def oracle_float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


def oracle_code(value: float, scale: int) -> int:
    """Nearest E2M1 code by trying all eight, the even one of two equally near."""
    target = abs(Fraction(value) / Fraction(2) ** (scale - 127))
    distance = [(abs(target - size), code & 1, code) for code, size in enumerate(MAGNITUDES)]
    return min(distance)[2] | (8 if math.copysign(1, value) < 0 else 0)


def all_bytes(scale: int) -> Mxfp4:
    """Every byte once: 16 blocks of 16 bytes that share `scale`."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    return Mxfp4(blocks, torch.full((16,), scale, dtype=torch.uint8))


def bits(x: torch.Tensor) -> list[int]:
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(size).flatten().tolist()


def oracle_bytes(scale: int) -> list[float]:
    return [oracle_value(c, scale) for byte in range(256) for c in (byte & 15, byte >> 4)]


@pytest.mark.parametrize("scale", EDGES)
def test_every_byte_reads_as_the_format_says_in_float32(scale):
    expected = b"".join(oracle_float32(v) for v in oracle_bytes(scale))
    got = dequantize(all_bytes(scale), torch.float32)
    assert got.shape == (512,)
    assert bits(got) == list(struct.unpack("<512i", expected))


@pytest.mark.parametrize("scale", EDGES)
def test_every_byte_reads_as_the_format_says_in_bfloat16(scale):
    # No E2M1 number needs more than two bits, so bfloat16 is the upper half of float32.
    words = [struct.unpack("<i", oracle_float32(v))[0] for v in oracle_bytes(scale)]
    assert all(word & 0xFFFF == 0 for word in words)
    assert bits(dequantize(all_bytes(scale), torch.bfloat16)) == [word >> 16 for word in words]


@pytest.mark.parametrize("scale", EDGES)
def test_float64_is_exact_everywhere_and_float16_is_float32_rounded(scale):
    expected = struct.unpack("<512q", struct.pack("<512d", *oracle_bytes(scale)))
    assert bits(dequantize(all_bytes(scale), torch.float64)) == list(expected)
    rounded = dequantize(all_bytes(scale), torch.float32).half()
    assert bits(dequantize(all_bytes(scale), torch.float16)) == bits(rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scale_255_is_nan_for_every_byte(dtype):
    assert dequantize(all_bytes(255), dtype).isnan().all()


def test_every_exponent_multiplies_one_exactly():
    ones = torch.full((255, 1, 16), 0x22, dtype=torch.uint8)
    got = dequantize(Mxfp4(ones, torch.arange(255).byte().unsqueeze(-1)), torch.float32)
    assert got.shape == (255, 32)
    for row, scale in zip(got.double().tolist(), range(255), strict=True):
        assert set(row) == {2.0 ** (scale - 127)}


def test_blocks_of_several_dimensions_keep_their_order():
    blocks = torch.arange(2 * 3 * 2 * 16, dtype=torch.int64).to(torch.uint8).reshape(2, 3, 2, 16)
    scales = torch.arange(120, 132, dtype=torch.uint8).reshape(2, 3, 2)
    got = dequantize(Mxfp4(blocks, scales), torch.float32)
    assert got.shape == (2, 3, 64)
    for e, n, k in ((0, 0, 0), (1, 2, 63), (1, 0, 33), (0, 2, 31)):
        byte = blocks[e, n, k // 32, k % 32 // 2].item()
        code = byte >> 4 if k % 2 else byte & 15
        assert got[e, n, k].item() == oracle_value(code, scales[e, n, k // 32].item())


def test_no_blocks_is_no_values():
    empty = Mxfp4(torch.empty(3, 5, 0, 16).byte(), torch.empty(3, 5, 0).byte())
    assert dequantize(empty, torch.bfloat16).shape == (3, 5, 0)
    packed = quantize(torch.empty(3, 0))
    assert (packed.blocks.shape, packed.scales.shape) == ((3, 0, 16), (3, 0))
    assert quantize(torch.empty(0, 64)).blocks.shape == (0, 2, 16)


@pytest.mark.parametrize("scale", EDGES)
def test_given_their_scales_all_codes_come_back_bit_for_bit(scale):
    packed = all_bytes(scale)
    again = quantize(dequantize(packed, torch.float64), packed.scales)
    assert torch.equal(again.blocks, packed.blocks)
    assert torch.equal(again.scales, packed.scales)


@pytest.mark.parametrize("scale", [0, 1, 2, 127, 252])
def test_values_that_the_format_holds_survive_a_round_trip(scale):
    values = dequantize(all_bytes(scale), torch.float32)
    assert bits(dequantize(quantize(values), torch.float32)) == bits(values)


def test_ties_go_to_the_even_code_and_large_values_saturate():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 7.0, 7.999, 1e30]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0, 6.0]
    x = torch.zeros(BLOCK)
    x[: len(ties)] = torch.tensor(ties)
    for sign in (1, -1):
        got = dequantize(quantize(sign * x, torch.tensor([127]).byte()), torch.float32)
        assert got[: len(ties)].tolist() == [sign * v for v in expected]


def test_the_scale_is_the_exponent_of_the_largest_magnitude_less_two():
    for largest, byte in ((4.0, 127), (7.99, 127), (8.0, 128), (6.0, 127), (3.99, 126), (1e-45, 0)):
        x = torch.zeros(BLOCK)
        x[5] = -largest
        assert quantize(x).scales.tolist() == [byte]
    assert quantize(torch.zeros(BLOCK)).scales.tolist() == [0]
    assert quantize(torch.full((BLOCK,), 3e38)).scales.tolist() == [252]
    assert quantize(torch.full((BLOCK,), 1e300, dtype=torch.float64)).scales.tolist() == [254]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_nan_or_infinity_reads_as_nan_and_leaves_its_neighbours_alone(bad):
    x = torch.ones(3 * BLOCK)
    x[BLOCK + 7] = bad
    for scales in (None, torch.tensor([127, 127, 127]).byte()):
        packed = quantize(x, scales)
        assert packed.scales[1].item() == 255
        assert not packed.blocks[1].any()
        got = dequantize(packed, torch.float32)
        assert got.isnan().tolist() == [False] * BLOCK + [True] * BLOCK + [False] * BLOCK


def test_whole_blocks_only():
    with pytest.raises(AssertionError, match="33 values are no whole blocks of 32"):
        quantize(torch.zeros(33))


finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_one = st.floats(-8, 8, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(finite32, near_one), min_size=BLOCK, max_size=BLOCK))
def test_any_finite_block_is_rounded_as_the_oracle_rounds(values):
    x = torch.tensor(values, dtype=torch.float32)
    packed = quantize(x)
    largest = max(abs(v) for v in values)
    exponent = math.frexp(largest)[1] - 1 if largest else -1000
    scale = min(max(exponent - 2 + 127, 0), 254)
    assert packed.scales.tolist() == [scale]
    expected = [oracle_code(v, scale) for v in values]
    assert packed.blocks.tolist() == [[a | b << 4 for a, b in zip(*[iter(expected)] * 2)]]  # noqa: B905


@settings(max_examples=60, deadline=None)
@given(st.lists(near_one, min_size=BLOCK, max_size=BLOCK), st.integers(0, 254))
def test_any_given_scale_is_used_as_the_oracle_uses_it(values, scale):
    packed = quantize(torch.tensor(values, dtype=torch.float32), torch.tensor([scale]).byte())
    codes = [n for byte in packed.blocks.flatten().tolist() for n in (byte & 15, byte >> 4)]
    assert codes == [oracle_code(v, scale) for v in values]
