"""What each operation computes, in torch, in float32 at least. Loops, synchronises, needs no GPU.

T: tokens, B: sequences, H and KV: query and key heads, D: head width, N: pages of a table, V: ids.
A cache is k and v [blocks, page, KV, D]; tables_BN names the page of positions j * page on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_decode(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    norm_K: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """rms_norm(x) * norm, rounded to x's dtype, @ weight.T + bias + residual, rounded once."""
    wide = torch.promote_types(x_TK.dtype, torch.float32)
    x = x_TK.to(wide)
    if norm_K is not None:
        x = norm_K.to(wide) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
        x = x.to(x_TK.dtype).to(wide)
    y_TN = x @ weight_NK.to(wide).t()
    for term in (bias_N, residual_TN):
        if term is not None:
            y_TN = y_TN + term.to(wide)
    return y_TN.to(out_dtype or x_TK.dtype)


def rope(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (d, d + D/2) by its token's angle; cos, sin [T, D/2]. Rounded once."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    first, second = x_THD.to(wide).chunk(2, dim=-1)
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]
    return torch.cat([first * c - second * s, second * c + first * s], -1).to(x_THD.dtype)


def cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache holds it; what float8 cannot hold becomes its largest value."""
    if dtype == torch.float8_e4m3fn:
        x = x.float().clamp(-448, 448)
    return x.to(dtype)


def rope_write(
    qkv_TX: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """q_THD, turned; writes turned k, and v, to slots_T.

    slots_T: page * page_size + offset; nothing is written where it is negative. qkv_TX: H query
    heads, KV key heads, KV value heads a row.
    """
    kv, width = k_cache.shape[2:]
    heads = qkv_TX.shape[1] // width - 2 * kv
    parts = qkv_TX.view(len(qkv_TX), heads + 2 * kv, width).split((heads, kv, kv), 1)
    k_TKD = rope(parts[1], cos, sin)
    kept = slots_T >= 0
    for new, cache in ((k_TKD, k_cache), (parts[2], v_cache)):
        # Indexing float8 is not implemented everywhere, so bytes are moved as such.
        flat = cache.view(-1, kv, width).view(_bytes(cache.dtype))
        flat[slots_T[kept]] = cached(new[kept], cache.dtype).view(_bytes(cache.dtype))
    return rope(parts[0], cos, sin)


def _bytes(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    tables_BN: Tensor,
    sinks_H: Tensor,
    window: int | None,
) -> Tensor:
    """o_THD: each query over the keys of its own sequence up to its own position.

    Sequence b's tokens are rows starts_B[b] to starts_B[b + 1], the last of its lengths_B[b].
    window: a query at position i sees keys i - window + 1 to i; pages wholly before are not read.
    sinks_H: a logit a head that takes its share of the softmax and gives no value (arXiv
    2508.10925). Scores are scaled by 1/sqrt(D).
    """
    out_THD = torch.zeros_like(q_THD)
    starts, lengths = starts_B.tolist(), lengths_B.tolist()
    for b, length in enumerate(lengths):
        count = starts[b + 1] - starts[b]
        if count and length:
            low = 0 if window is None else max(0, length - count - window + 1)
            k_SKD, v_SKD = (_read(x, tables_BN[b], low, length) for x in (k_cache, v_cache))
            rows = slice(starts[b], starts[b + 1])
            out_THD[rows] = _attend(q_THD[rows], k_SKD, v_SKD, length, low, window, sinks_H)
    return out_THD


def _read(cache: Tensor, table_N: Tensor, low: int, stop: int) -> Tensor:
    page = cache.shape[1]
    pages = table_N[low // page : -(-stop // page)].long()
    assert bool((pages >= 0).all()), f"positions {low} to {stop} lie in freed pages: {table_N}"
    rows = cache.view(_bytes(cache.dtype))[pages].view(cache.dtype).flatten(0, 1)
    return rows[low % page :][: stop - low]


def _attend(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    length: int,
    low: int,
    window: int | None,
    sinks_H: Tensor,
) -> Tensor:
    tokens, _heads, width = q_THD.shape
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    q = q_THD.view(tokens, k_SKD.shape[1], -1, width).to(wide)
    scores = torch.einsum("qkgd,skd->kgqs", q, k_SKD.to(wide)) * width**-0.5
    keys = torch.arange(low, length, device=q.device)
    ahead = torch.arange(length - tokens, length, device=q.device)[:, None] - keys
    seen = (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)
    scores = scores.masked_fill(~seen, -torch.inf)
    sinks = sinks_H.to(wide).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return torch.einsum("kgqs,skd->qkgd", weights, v_SKD.to(wide)).reshape(q_THD.shape).to(q_THD)


def decode_attention(
    q_BHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    sinks_H: Tensor,
    window: int | None,
) -> Tensor:
    """attention of one token a sequence; zeros where lengths_B is 0."""
    starts_B = torch.arange(len(q_BHD) + 1)
    return attention(q_BHD, k_cache, v_cache, starts_B, lengths_B, tables_BN, sinks_H, window)


def sample(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, u_B: Tensor
) -> Tensor:
    """ids_B int64. temperature 0: the likeliest token, of equal ones the lowest id.

    Else temperature, then top-k (0: all), then top-p (1: all; the likeliest tokens up to the one
    that reaches it, of equal ones the lower id first), and the first id, in order of ids, whose
    cumulative probability passes u. float64 throughout.
    """
    ids_B = logits_BV.argmax(-1)
    for b in torch.nonzero(temperature_B > 0)[:, 0].tolist():
        scores_V = logits_BV[b].double()
        p_V = ((scores_V - scores_V.max()) / temperature_B[b]).softmax(-1)
        order_V = p_V.argsort(descending=True, stable=True)
        sorted_V = p_V[order_V]
        if top_k_B[b] > 0:
            sorted_V[int(top_k_B[b]) :] = 0
        sorted_V = sorted_V / sorted_V.sum()
        if top_p_B[b] < 1:
            sorted_V[sorted_V.cumsum(0) - sorted_V >= top_p_B[b]] = 0
        kept_V = torch.zeros_like(p_V).scatter(0, order_V, sorted_V)
        cdf_V = kept_V.cumsum(0)
        below = torch.nextafter(cdf_V[-1], torch.zeros_like(cdf_V[-1]))
        target = torch.minimum(u_B[b] * cdf_V[-1], below)
        ids_B[b] = torch.searchsorted(cdf_V, target, right=True)
    return ids_B
