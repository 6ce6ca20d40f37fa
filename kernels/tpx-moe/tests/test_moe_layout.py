"""Packing: an exact inverse, the documented places of the bits, and the assembly's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moe_numbers import checkpoint
from tpx_moe import pack, packed_nbytes, reference, unpack
from tpx_moe.layout import FOLD, PARTS, PLACES, TILE, WORDS

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(64, 64), (96, 32), (16, 96), (160, 736), (128, 704), (2, 160)]
)
@pytest.mark.parametrize("scales", [(1, 128), (0, 255)])
def test_unpack_gives_back_every_byte(rows, columns, pairs, scales):
    blocks, bytes_ = checkpoint(2, rows, columns, scales=scales)
    packed = pack(blocks, bytes_, pairs)
    assert (packed.codes.shape[1], packed.scales.shape[1]) == packed_nbytes(rows, columns)
    back = unpack(packed)
    assert torch.equal(back[0], blocks)
    assert torch.equal(back[1], bytes_)


@pytest.mark.parametrize("byte", range(256))
def test_every_scale_byte_survives_and_only_the_usual_ones_are_folded(byte):
    blocks, bytes_ = checkpoint(1, 4, 64, scales=(byte, byte))
    packed = pack(blocks, bytes_, False)
    assert packed.exact == (not 1 <= byte <= 128)
    assert torch.equal(unpack(packed)[1], bytes_)


def test_one_unusual_byte_makes_the_whole_matrix_exact():
    blocks, bytes_ = checkpoint(2, 64, 64)
    bytes_[1, 3, 1] = 0
    assert pack(blocks, bytes_, False).exact


def test_pack_writes_into_the_memory_that_it_is_given():
    blocks, bytes_ = checkpoint(2, 64, 96)
    slots = [torch.empty(2, n, dtype=torch.uint8) for n in packed_nbytes(64, 96)]
    packed = pack(blocks, bytes_, True, out=(slots[0], slots[1]))
    assert packed.codes.data_ptr() == slots[0].data_ptr()
    assert packed.scales.data_ptr() == slots[1].data_ptr()
    assert torch.equal(packed.codes, pack(blocks, bytes_, True).codes)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 32), (2, 160), (144, 96)])
def test_the_kernel_packs_as_torch_does(rows, columns, pairs):
    pack_codes = pytest.importorskip("tpx_moe.pack_kernels", reason="needs triton").pack_codes
    blocks, bytes_ = checkpoint(2, rows, columns)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    right = pack(blocks, bytes_, pairs).codes
    found = torch.full_like(right, 255, device=where)
    pack_codes(blocks.to(where), pairs, found)
    assert torch.equal(found.cpu(), right)


def test_the_sizes_of_gpt_oss():
    assert packed_nbytes(5760, 2880) == (5760 * 1440, 5760 * 92)
    assert packed_nbytes(2880, 2880) == (2880 * 1440, 2880 * 92)
    assert packed_nbytes(2880, 736) == (2880 * 384, 2880 * 24)


def test_a_words_place_is_the_documented_one():
    blocks, bytes_ = checkpoint(1, 128, 192)
    blocks[0] = 0
    row, column = 70, 141  # tile 1, row 6; granule 2, part 0, word 13
    blocks[0, row, column // 32, column % 32 // 2] = 0xF0  # an odd column is the high nibble
    words = pack(blocks, bytes_, False).codes.view(torch.int16).view(2, 3, TILE, WORDS)
    assert words.nonzero().tolist() == [[1, 2, 6, 13]]
    assert words[1, 2, 6, 13].item() & 0xFFFF == sum(1 << place for place in PLACES[0])


def test_pairs_put_the_gates_of_16_rows_first():
    blocks, bytes_ = checkpoint(1, 64, 64)
    plain, paired = (
        pack(blocks, bytes_, pairs).codes.view(torch.int16).view(TILE, WORDS)
        for pairs in (False, True)
    )
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    assert torch.equal(paired[16:32], plain[16:32][order])


def test_dequantize_is_what_the_format_says():
    blocks, bytes_ = checkpoint(1, 32, 64, scales=(0, 254))
    found = reference.dequantize(pack(blocks, bytes_, True), torch.float64)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).numpy()
    right = E2M1[codes] * 2.0 ** (bytes_.numpy().astype(float) - 127)[..., None]
    assert np.array_equal(found.numpy(), right.reshape(1, 32, 64))


def test_the_assembly_decodes_all_words_exactly():
    """The instructions of unpack_kernels.UNPACK in numpy, on pairs of words in one register, with
    bfloat16 numbers as float64 ones."""
    words = np.arange(1 << 16, dtype=np.uint32)
    partner = np.random.default_rng(0).permutation(words)
    register = words | partner << 16
    parts = [
        register & 0x81C081C0,
        (register << 3) & 0x81C081C0,
        (register << 6) & 0x81C081C0,
        ((register << 1) & 0x80008000)
        | ((register >> 5) & 0x01000100)
        | ((register >> 4) & 0x00C000C0),
    ]
    for half, word in ((0, words), (16, partner)):
        for j in range(PARTS):
            code = sum((word >> place & 1) << (3 - i) for i, place in enumerate(PLACES[j]))
            bits = (parts[j] >> half) & 0xFFFF
            assert np.array_equal(bfloat16(bits) * 2.0**126, E2M1[code])


def test_a_folded_scale_gives_the_value_in_one_product():
    for byte in range(1, 129):
        folded = bfloat16(np.array([(byte + FOLD) << 7], dtype=np.uint32))[0]
        exact = E2M1 * 2.0 ** (byte - 127)
        assert np.array_equal(E2M1 * 2.0**-126 * folded, exact)
        assert (byte + FOLD) << 7 < 0x7F80  # no infinity


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """float64 of 16-bit patterns, subnormals included."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
