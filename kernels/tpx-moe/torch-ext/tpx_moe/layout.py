"""Where the bits of a packed MXFP4 matrix lie, and how many bytes it takes. Needs no torch.

A matrix has `rows` outputs and `columns` inputs; 32 inputs share a scale. Packed:

codes   [tiles, granules, 64, 16] 16-bit words: 64 rows by 64 columns are one granule of 2 KiB, and
        the granules of 64 rows follow each other, so who computes 64 rows reads one linear range.
        Word c of a row holds columns c, 16 + c, 32 + c and 48 + c of the granule, part j = 0..3 at
        the bits PLACES[j] (sign, then the three bits of the magnitude). Masking the word, and the
        word shifted left by 3 and by 6, gives parts 0, 1, 2 as bfloat16 numbers of 2**-126 times
        the value; part 3 takes the bits that are left.
scales  [tiles, ceil(granules / 2), 64] 32-bit words: four scale bytes of 128 columns of a row, the
        first in the lowest byte.

A word depends on its own four codes alone, so no way of pairing words in a register can be wrong.
Rows and columns are filled up to 64 with zeros of scale 1. Where rows come in pairs (gate and up
interleaved), each 16 rows hold their 8 gates first: both then lie in one thread's registers.

Scale bytes are stored 126 higher, which undoes the 2**-126 in the same multiplication. That fits
for bytes 1 to 128; a matrix with any other byte is stored `exact`: bytes as they are, and one more
multiplication.
"""

from __future__ import annotations

from typing import NamedTuple

TILE = 64  # rows of a tile, and columns of a granule
BLOCK = 32  # columns that share a scale
PARTS = 4
WORDS = TILE // PARTS  # words of a row in a granule
PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))
FOLD = 126  # added to scale bytes
FOLDS = (1, 128)  # the bytes, first and last, that it can be added to


class Shape(NamedTuple):
    """Of one expert's packed matrix."""

    tiles: int
    granules: int

    @property
    def code_bytes(self) -> int:
        return self.tiles * self.granules * TILE * WORDS * 2

    @property
    def scale_bytes(self) -> int:
        return self.tiles * self.pairs * TILE * 4

    @property
    def pairs(self) -> int:
        """Pairs of granules, which share a word of scales."""
        return -(-self.granules // 2)


def packed_shape(rows: int, columns: int) -> Shape:
    return Shape(-(-rows // TILE), -(-columns // TILE))


def packed_nbytes(rows: int, columns: int) -> tuple[int, int]:
    """Bytes of an expert's codes and of its scales. For gpt-oss the codes take what the
    checkpoint's blocks take, and the scales 1/45 more; 32 odd columns are filled up to 64."""
    shape = packed_shape(rows, columns)
    return shape.code_bytes, shape.scale_bytes


def row_order(pairs: bool) -> list[int]:
    """Which row of 16 stands at each place."""
    return [*range(0, 16, 2), *range(1, 16, 2)] if pairs else list(range(16))
