"""Attention over a paged cache: grouped heads, sinks, sliding window. The torch reference.

Loops over sequences and blocks of queries, in float32 at least. Knows no rank: heads are local.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import FULL, SLIDING, Batch, KVCache
from .cpu import native

QUERY_BLOCK = (
    512  # queries at a time, so that scores stay small; with a window so does what is read
)


def write_cache(k_TKD: Tensor, v_TKD: Tensor, cache: KVCache, slots_T: Tensor) -> None:
    """Puts token t's key and value into slot slots_T[t], page * page_size + offset."""
    if (fast := native(k_TKD, v_TKD, cache.k, cache.v)) is not None:
        return fast.write_cache(k_TKD, v_TKD, cache.k, cache.v, slots_T)
    for new, pages in ((k_TKD, cache.k), (v_TKD, cache.v)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots_T, new.to(pages.dtype))


def attention(
    q_THD: Tensor, cache: KVCache, batch: Batch, window: int | None, sinks_H: Tensor
) -> Tensor:
    """o_THD: each query over the keys of its own sequence up to its own position.

    The batch's own keys and values are in the cache already (write_cache). window: a query at
    position i sees keys i - window + 1 to i, and pages wholly before those are never read; None:
    all of them. sinks_H: a logit a head that takes its share of the softmax and gives no value
    (arXiv 2508.10925). Scores are scaled by 1/sqrt(D).
    """
    tables_BN = batch.tables_BN[FULL if window is None else SLIDING]
    if (fast := native(q_THD, cache.k, cache.v, sinks_H)) is not None:
        places = tables_BN, batch.starts_B, batch.lengths_B
        return fast.attention(q_THD, cache.k, cache.v, *places, window, sinks_H)
    starts, lengths = batch.starts_B.tolist(), batch.lengths_B.tolist()
    out = [q_THD[:0]]  # keeps the graph connected on a rank without tokens
    for b, length in enumerate(lengths):
        past = length - (starts[b + 1] - starts[b])
        for first in range(past, length, QUERY_BLOCK):
            stop = min(first + QUERY_BLOCK, length)
            rows = slice(starts[b] + first - past, starts[b] + stop - past)
            low = 0 if window is None else max(0, first - window + 1)
            k_SKD, v_SKD = _read(cache, tables_BN[b], low, stop)
            seen = _visible(first, stop, low, window, q_THD.device)
            out.append(_attend(q_THD[rows], k_SKD, v_SKD, seen, sinks_H))
    return torch.cat(out)


def _read(cache: KVCache, table_N: Tensor, low: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values [S, KV, D] of positions low to stop, by the pages that hold them."""
    page = cache.k.shape[1]
    begin = low // page
    pages = table_N[begin : -(-stop // page)]
    assert bool((pages >= 0).all()), f"positions {low} to {stop} lie in freed pages: {table_N}"
    span = slice(low - begin * page, stop - begin * page)
    return (
        cache.k.index_select(0, pages).flatten(0, 1)[span],
        cache.v.index_select(0, pages).flatten(0, 1)[span],
    )


def _visible(first: int, stop: int, low: int, window: int | None, device: torch.device) -> Tensor:
    """[queries first to stop, keys low to stop]: whether the query sees the key."""
    queries = torch.arange(first, stop, device=device)
    ahead = queries[:, None] - torch.arange(low, stop, device=device)
    return (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)


def _attend(
    q_qHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, seen_qS: Tensor, sinks_H: Tensor
) -> Tensor:
    """One block of queries of one sequence; query head h reads key head h // (H / KV)."""
    queries, heads, width = q_qHD.shape
    grouped = (queries, k_SKD.shape[1], heads // k_SKD.shape[1], width)
    wide = torch.promote_types(q_qHD.dtype, torch.float32)
    q, k, v = q_qHD.view(grouped).to(wide), k_SKD.to(wide), v_SKD.to(wide)
    scores = torch.einsum("qkgd,skd->kgqs", q, k) * width**-0.5
    scores = scores.masked_fill(~seen_qS, -torch.inf)
    sinks = sinks_H.to(wide).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("kgqs,skd->qkgd", weights, v).reshape(q_qHD.shape).to(q_qHD.dtype)
