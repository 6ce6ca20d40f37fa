"""A checkpoint's blocks to the words of layout.py, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .layout import PARTS, PLACES, TILE, WORDS, packed_shape

if TYPE_CHECKING:  # a process that only compiles imports no torch
    from torch import Tensor

# Bits of a code, four each, of part 0 first: a launch takes no nested tuple.
CODE = sum(bit << 4 * (4 * j + i) for j, bits in enumerate(PLACES) for i, bit in enumerate(bits))


def pack_codes(blocks: Tensor, pairs: bool, out: Tensor) -> None:
    """blocks [e, rows, columns / 32, 16] into out [e, code_bytes], both uint8 and contiguous."""
    experts, rows, groups, half = blocks.shape
    columns = groups * half * 2
    shape = packed_shape(rows, columns)
    if out.numel():
        pack_kernel[(shape.tiles * shape.granules, experts)](
            blocks, out, rows, columns, shape.granules, out.stride(0),
            PAIRS=pairs, PLACES=CODE, TILE=TILE, PARTS=PARTS, WORDS=WORDS, num_warps=4,
        )  # fmt: skip


@triton.jit
def pack_kernel(
    blocks, packed, rows, columns, granules, stride,
    PAIRS: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    granule = tl.program_id(0) % granules
    tile = tl.program_id(0) // granules
    expert = tl.program_id(1).to(tl.int64)
    r, c = tl.arange(0, TILE), tl.arange(0, WORDS)
    place = r % 16
    if PAIRS:  # each 16 rows hold their 8 gates first
        place = place % 8 * 2 + place // 8
    row = tile * TILE + r // 16 * 16 + place
    blocks += expert * rows * (columns // 2)
    words = tl.zeros((TILE, WORDS), tl.int32)
    for j in tl.static_range(PARTS):
        column = granule * TILE + j * WORDS + c
        here = (row < rows)[:, None] & (column < columns)[None, :]
        bytes_ = tl.load(
            blocks + row[:, None] * (columns // 2) + (column // 2)[None, :], mask=here, other=0
        )
        codes = bytes_.to(tl.int32) >> (column % 2 * 4)[None, :] & 15
        for i in tl.static_range(4):
            words |= (codes >> (3 - i) & 1) << ((PLACES >> (4 * (4 * j + i))) & 15)
    at = (tl.program_id(0) * TILE + r)[:, None] * WORDS + c[None, :]
    packed += expert * stride
    tl.store(packed + at * 2, (words & 255).to(tl.uint8))
    tl.store(packed + at * 2 + 1, (words >> 8 & 255).to(tl.uint8))
