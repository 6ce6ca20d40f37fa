"""Attention over a paged cache: grouped heads, sinks, sliding window. Heads are local.

The torch reference loops over sequences and blocks of queries, in float32 at least. Kernels are of
two kinds: tpx_attention's, which turn, write and attend, and FlashAttention's own interface.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import FULL, SLIDING, Batch, KVCache
from .cpu import native
from .kernel import Kernel

QUERY_BLOCK = (
    512  # queries at a time, so that scores stay small; with a window so does what is read
)


def write_cache(k_TKD: Tensor, v_TKD: Tensor, cache: KVCache, slots_T: Tensor) -> None:
    """Puts token t's key and value into slot slots_T[t], page * page_size + offset."""
    if (fast := native(k_TKD, v_TKD, cache.k, cache.v)) is not None:
        return fast.write_cache(k_TKD, v_TKD, cache.k, cache.v, slots_T)
    for new, pages in ((k_TKD, cache.k), (v_TKD, cache.v)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots_T, new.to(pages.dtype))


def is_fused(kernel: Kernel) -> bool:
    """Whether a kernel takes queries, keys and values together: see rope_attention."""
    return hasattr(kernel, "rope_write_attention")


def rope_attention(
    qkv_TX: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    batch: Batch,
    window: int | None,
    sinks_H: Tensor,
    kernel: Kernel,
) -> Tensor:
    """o_THD of rows of query, key and value heads: turns, writes to the cache and attends.

    The batch was ready before any launch that may still run, so a kernel may read it early.
    """
    kind = FULL if window is None else SLIDING
    write = cos, sin, batch.slots_T[kind], cache.k, cache.v
    tables_BN, lengths_B = batch.tables_BN[kind], batch.lengths_B
    if batch.decode:
        lookup = tables_BN, lengths_B, sinks_H, window
        o_THD: Tensor = kernel.rope_write_attention(qkv_TX, *write, *lookup, True)
        return o_THD
    q_THD = kernel.rope_write(qkv_TX, *write)
    places = batch.starts_B, lengths_B, tables_BN
    o_THD = kernel.prefill_attention(q_THD, cache.k, cache.v, *places, sinks_H, window)
    return o_THD


def flash_attention(
    q_THD: Tensor,
    cache: KVCache,
    batch: Batch,
    window: int | None,
    sinks_H: Tensor,
    kernel: Kernel,
) -> Tensor:
    """`attention` by FlashAttention's `flash_attn_varlen_func` with a block table and sinks
    (`s_aux`), as kernels-community/vllm-flash-attn3 has it."""
    tables_BN = batch.tables_BN[FULL if window is None else SLIDING]
    page = cache.k.shape[1]
    o_THD: Tensor = kernel.flash_attn_varlen_func(
        q_THD,
        cache.k,
        cache.v,
        max_seqlen_q=1 if batch.decode else q_THD.shape[0],
        cu_seqlens_q=batch.starts_B,
        max_seqlen_k=tables_BN.shape[1] * page,
        seqused_k=batch.lengths_B,
        softmax_scale=q_THD.shape[-1] ** -0.5,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        block_table=tables_BN.clamp(min=0),  # pages that left the window are masked, but read
        s_aux=sinks_H,
    )
    return o_THD


def attention(
    q_THD: Tensor,
    cache: KVCache,
    batch: Batch,
    window: int | None,
    sinks_H: Tensor,
    kernel: Kernel = None,
) -> Tensor:
    """o_THD: each query over the keys of its own sequence up to its own position.

    The batch's own keys and values are in the cache already (write_cache). window: a query at
    position i sees keys i - window + 1 to i, and pages wholly before those are never read; None:
    all of them. sinks_H: a logit a head that takes its share of the softmax and gives no value
    (arXiv 2508.10925). Scores are scaled by 1/sqrt(D).
    """
    if kernel is not None and q_THD.shape[0]:
        return flash_attention(q_THD, cache, batch, window, sinks_H, kernel)
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
