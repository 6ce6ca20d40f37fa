"""From a checkpoint's blocks and scales to the layout of layout.py, and exactly back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import device
from .layout import BLOCK, FOLD, FOLDS, PARTS, PLACES, TILE, WORDS, packed_shape, row_order


class Packed(NamedTuple):
    """codes [e, code_bytes] and scales [e, scale_bytes], uint8, contiguous (layout.py); rows and
    columns of one expert before they were filled up; whether the scales are stored `exact`, and
    whether rows come in `pairs`."""

    codes: Tensor
    scales: Tensor
    rows: int
    columns: int
    pairs: bool
    exact: bool


def pack(
    blocks: Tensor, scales: Tensor, pairs: bool, out: tuple[Tensor, Tensor] | None = None
) -> Packed:
    """blocks [e, rows, columns / 32, 16] uint8 and scales [e, rows, columns / 32] uint8 (OCP MX
    v1.0, the lower nibble first), packed. `pairs`: rows alternate between gate and up.

    Writes into `out` (codes [e, code_bytes], scales [e, scale_bytes]) where it is given, which must
    not share memory with the inputs. Looks once at all scales, so it waits for the device.
    """
    experts, rows, groups, half = blocks.shape
    assert half * 2 == BLOCK, f"{half} bytes a block, not {BLOCK // 2}"
    assert scales.shape == blocks.shape[:3], f"{tuple(scales.shape)=} {tuple(blocks.shape)=}"
    assert not pairs or rows % 2 == 0, f"{rows} rows are no pairs"
    shape = packed_shape(rows, groups * BLOCK)
    if out is None:
        sizes = (shape.code_bytes, shape.scale_bytes)
        codes, bytes_ = (scales.new_empty(experts, size) for size in sizes)
    else:
        codes, bytes_ = out
    assert codes.shape == (experts, shape.code_bytes), f"{tuple(codes.shape)=} {shape=}"
    assert bytes_.shape == (experts, shape.scale_bytes), f"{tuple(bytes_.shape)=} {shape=}"
    exact = bool(((scales < FOLDS[0]) | (scales > FOLDS[1])).any())
    order = torch.tensor(row_order(pairs), device=blocks.device)
    if device.available(blocks.device, torch.float16):
        from .pack_kernels import pack_codes

        pack_codes(blocks.contiguous(), pairs, codes)
    else:
        for e in range(experts):
            codes[e] = _pack_codes(blocks[e], shape.tiles, shape.granules, order)
    bytes_.copy_(_pack_scales(scales, shape.tiles, shape.pairs, order, exact))
    return Packed(codes, bytes_, rows, groups * BLOCK, pairs, exact)


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """The blocks and scales that pack was given, byte for byte."""
    experts, shape = packed.codes.shape[0], packed_shape(packed.rows, packed.columns)
    order = torch.tensor(row_order(packed.pairs), device=packed.codes.device).argsort()
    groups = packed.columns // BLOCK
    blocks = packed.codes.new_empty(experts, packed.rows, groups, BLOCK // 2)
    scales = packed.codes.new_empty(experts, packed.rows, groups)
    for e in range(experts if blocks.numel() else 0):
        words = packed.codes[e].view(torch.int16).view(shape.tiles, shape.granules, TILE, WORDS)
        values = torch.stack([_take(words.int(), PLACES[j]) for j in range(PARTS)], dim=-2)
        values = values.permute(0, 2, 1, 3, 4).flatten(2)  # [tiles, 64, columns]
        values = _reorder(values, order).flatten(0, 1)[: packed.rows, : packed.columns]
        values = values.reshape(packed.rows, groups, BLOCK // 2, 2)
        blocks[e] = values[..., 0] | values[..., 1] << 4
        bytes_ = packed.scales[e].view(shape.tiles, shape.pairs, TILE, PARTS)
        bytes_ = _reorder(bytes_.permute(0, 2, 1, 3).flatten(2), order).flatten(0, 1)
        bytes_ = bytes_[: packed.rows, :groups]
        scales[e] = bytes_ if packed.exact else bytes_ - FOLD
    return blocks, scales


def _pack_codes(blocks: Tensor, tiles: int, granules: int, order: Tensor) -> Tensor:
    rows, columns = blocks.shape[0], blocks.shape[1] * BLOCK
    codes = blocks.new_zeros(tiles * TILE, granules * TILE)
    codes[:rows, 0:columns:2] = blocks.flatten(1) & 15
    codes[:rows, 1:columns:2] = blocks.flatten(1) >> 4
    codes = _reorder(codes.view(tiles, TILE, granules, PARTS, WORDS), order).int()
    words = sum(_put(codes[..., j, :], PLACES[j]) for j in range(PARTS))
    assert isinstance(words, Tensor)
    return words.permute(0, 2, 1, 3).to(torch.int16).contiguous().view(torch.uint8).flatten()


def _pack_scales(scales: Tensor, tiles: int, pairs: int, order: Tensor, exact: bool) -> Tensor:
    """[e, scale_bytes] of scales [e, rows, groups]."""
    experts, rows, groups = scales.shape
    fill = 127
    bytes_ = scales.new_full((experts, tiles * TILE, pairs * PARTS), fill)
    bytes_[:, :rows, :groups] = scales
    if not exact:
        bytes_ += FOLD
    bytes_ = _reorder(bytes_.view(experts * tiles, TILE, pairs, PARTS), order)
    return bytes_.permute(0, 2, 1, 3).reshape(experts, tiles * pairs * TILE * PARTS)


def _reorder(values: Tensor, order: Tensor) -> Tensor:
    """[tiles, 64, ...] with each 16 rows in that order."""
    return values.unflatten(1, (TILE // 16, 16)).index_select(2, order).flatten(1, 2)


def _put(codes: Tensor, places: tuple[int, ...]) -> Tensor:
    """Words (int32) with four-bit codes at their places."""
    bits = ((codes >> 3 - i & 1) << place for i, place in enumerate(places))
    return sum(bits, codes.new_zeros(()))


def _take(words: Tensor, places: tuple[int, ...]) -> Tensor:
    """The codes (uint8) that _put put there."""
    bits = ((words >> place & 1) << 3 - i for i, place in enumerate(places))
    taken = sum(bits, words.new_zeros(()))
    return taken.to(torch.uint8)
