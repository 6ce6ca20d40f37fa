"""Random linear layers, caches of scattered pages, and the error between two results."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


def error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, of all elements together; NaN passes no comparison."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


class Paged(NamedTuple):
    """Sequences in a paged cache: only slots that a query sees hold numbers, the rest NaN."""

    q_THD: Tensor
    k: Tensor
    v: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    sinks: Tensor
    slots: Tensor
    window: int | None

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.starts, self.lengths, self.tables

    @property
    def lookup(self) -> tuple[Tensor, Tensor, Tensor, int | None]:
        return self.tables, self.lengths, self.sinks, self.window


def paged(
    counts,
    lengths,
    window=None,
    heads=4,
    kv=2,
    width=16,
    page=4,
    dtype=torch.float32,
    cache_dtype=None,
    device="cpu",
    seed=0,
) -> Paged:
    """counts[b] query tokens are the last of lengths[b] positions of sequence b."""
    make = torch.Generator().manual_seed(seed)
    pages = [-(-n // page) for n in lengths]
    blocks = sum(pages) + 2
    order = torch.randperm(blocks, generator=make).tolist()
    shape = (blocks, page, kv, width)
    k, v = (torch.randn(shape, generator=make).to(dtype) for _ in "kv")
    alive = torch.zeros(blocks * page, dtype=torch.bool)
    tables = torch.full((len(counts), max(pages, default=0) + 1), -1, dtype=torch.int32)
    slots = []
    for b, (count, length) in enumerate(zip(counts, lengths, strict=False)):
        mine = [order.pop() for _ in range(pages[b])]
        low = 0 if window is None else max(0, length - count - window + 1)
        for j in range(low // page, pages[b]):
            tables[b, j] = mine[j]
        at = [mine[p // page] * page + p % page for p in range(length)]
        alive[at[low:]] = True
        slots += at[length - count :]
    for cache in (k, v):
        cache.view(-1, kv, width)[~alive] = torch.nan
    k, v = (x.to(cache_dtype or dtype) for x in (k, v))
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    q = torch.randn((sum(counts), heads, width), generator=make).to(dtype)
    sinks = torch.randn(heads, generator=make).to(dtype)
    placed = (q, k, v, starts, torch.tensor(lengths, dtype=torch.int32), tables, sinks)
    slots_T = torch.tensor(slots, dtype=torch.int64, device=device)
    return Paged(*(x.to(device) for x in placed), slots_T, window)


def angles(tokens, width, dtype=torch.float32, device="cpu", seed=5) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    radians = torch.rand((tokens, width // 2), generator=make) * 6.3
    return radians.cos().to(device, dtype), radians.sin().to(device, dtype)


def new_rows(case: Paged, seed=7) -> Tensor:
    """Rows of q, k and v for one new token a sequence, [B, (H + 2 KV) * D]."""
    make = torch.Generator().manual_seed(seed)
    (heads, width), kv = case.q_THD.shape[1:], case.k.shape[2]
    rows = torch.randn((len(case.lengths), (heads + 2 * kv) * width), generator=make)
    return rows.to(case.q_THD)
