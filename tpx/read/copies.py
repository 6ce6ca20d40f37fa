"""A Copy of the byte plan, done: strided bytes from one flat tensor to another, or elements that
are cast on their way."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

import torch

from ..plan.spans import Copy
from .arena import Arena

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def scatter(copies: Iterable[Copy], read: torch.Tensor, arena: Arena) -> None:
    """Puts what was read where it is held, in the dtype it is held in. read: uint8, flat, on the
    arena's device; the copies' sources count from its first byte."""
    for copy in copies:
        name = copy.parameter
        _, _, stored, final = arena.held[name]
        if stored == final:
            move(copy, read, arena.slot(name))
        else:
            rows = _rows(copy, read, copy.source, copy.source_step, stored.itemsize, stored)
            to = copy.target, copy.target_step, stored.itemsize
            _rows(copy, arena.slot(name), *to, final).copy_(rows)


def move(copy: Copy, source: torch.Tensor, target: torch.Tensor) -> None:
    """The copy's bytes from one flat uint8 tensor to another on the same device, as integers as
    wide as its steps allow."""
    _, begin, to, nbytes, _, step, jump = copy
    offsets = int(source.storage_offset()), int(target.storage_offset())
    item = gcd(8, *offsets, begin, to, nbytes, step, jump)
    rows = _rows(copy, source, begin, step, item, INTEGERS[item])
    _rows(copy, target, to, jump, item, INTEGERS[item]).copy_(rows)


def _rows(
    copy: Copy, data: torch.Tensor, begin: int, step: int, item: int, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, elements] of the flat uint8 `data`. begin, step: in bytes where an element has `item`
    of them, as one of `dtype` need not."""
    count, width = copy.nbytes // item, dtype.itemsize
    first, apart = begin // item, step // item
    end = first + (copy.rows - 1) * apart + count
    assert 0 <= first < end <= len(data) // width, f"{copy} {len(data)=}"
    start = int(data.storage_offset())
    odd = (start % width, begin % item, step % item, copy.nbytes % item)
    assert not any(odd), f"{copy} {start=} {item=}"
    everything = data.untyped_storage().nbytes() // width * width
    typed = data.as_strided((everything,), (1,), 0).view(dtype)
    return typed.as_strided((copy.rows, count), (apart, 1), start // width + first)
