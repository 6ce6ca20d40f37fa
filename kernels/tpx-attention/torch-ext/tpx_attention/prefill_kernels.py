"""Attention of a flat ragged batch over a paged cache, and the step that fills the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_kernels import LOG2E, cached


@triton.jit(do_not_specialize=["tokens"])
def rope_write(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tokens,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program TOKENS tokens and EACH key heads: turns their query heads and k; k and v go to
    slots[token], nowhere if that is negative. qkv [T, (KV * GROUP + 2 * KV) * D]; HEADS: EACH *
    GROUP padded. Everything is asked for before anything is used."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    QUERIES: tl.constexpr = KV * GROUP
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, D // 2)[None, None, :]
    seen = (t < tokens)[:, None, None]
    slot = tl.load(slots_ptr + t, mask=t < tokens, other=-1)[:, None, None]
    row = t[:, None, None] * ((QUERIES + 2 * KV) * D)
    g = tl.arange(0, HEADS)[None, :, None]
    head = tl.program_id(1) * EACH * GROUP + g
    mine = seen & (g < EACH * GROUP)
    kv = tl.program_id(1) * EACH + tl.arange(0, EACH)[None, :, None]
    angle = t[:, None, None] * (D // 2) + d
    c = tl.load(cos_ptr + angle, mask=seen, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + angle, mask=seen, other=0.0).to(tl.float32)
    q0, q1 = _halves(qkv_ptr + row + head * D + d, mine, D)
    k0, k1 = _halves(qkv_ptr + row + (QUERIES + kv) * D + d, seen, D)
    v0, v1 = _halves(qkv_ptr + row + (QUERIES + KV + kv) * D + d, seen, D)
    kind: tl.constexpr = qkv_ptr.dtype.element_ty
    out = out_ptr + (t[:, None, None] * QUERIES + head) * D + d
    tl.store(out, (q0 * c - q1 * s).to(kind), mask=mine)
    tl.store(out + D // 2, (q1 * c + q0 * s).to(kind), mask=mine)
    at = (slot * KV + kv) * D + d
    kept = seen & (slot >= 0)
    _put(k_ptr + at, (k0 * c - k1 * s).to(kind), (k1 * c + k0 * s).to(kind), kept, D)
    _put(v_ptr + at, v0, v1, kept, D)


@triton.jit
def _halves(at, mask, D: tl.constexpr):
    """The two halves of heads, float32."""
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + D // 2, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _put(at, first, second, mask, D: tl.constexpr):
    tl.store(at, cached(first.to(tl.float32), at), mask=mask)
    tl.store(at + D // 2, cached(second.to(tl.float32), at), mask=mask)


@triton.jit
def _tile(
    q,
    top,
    weight,
    total,
    start,
    end,
    position,
    table_ptr,
    k_ptr,
    v_ptr,
    kv,
    scale,
    KV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Adds keys start to start + BLOCK_N, those from end on left out. MASKED: not every row sees
    all of them; without it the tile is whole. position: of each row's query."""
    s, d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    key = start + s
    if MASKED:
        page = tl.load(table_ptr + key // PAGE, mask=key < end, other=0)
    else:
        page = tl.load(table_ptr + key // PAGE)
    row = ((page.to(tl.int64) * PAGE + key % PAGE) * KV + kv) * D
    if MASKED:
        k = tl.load(k_ptr + row[None, :] + d[:, None], mask=(key < end)[None, :], other=0.0)
        v = tl.load(v_ptr + row[:, None] + d[None, :], mask=(key < end)[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + row[None, :] + d[:, None])
        v = tl.load(v_ptr + row[:, None] + d[None, :])
    if PLAIN:
        scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee")
    else:
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
    if MASKED:
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    weight = weight * fade + tl.sum(p, 1)
    total = total * fade[:, None]
    if PLAIN:
        total += tl.dot(p, v.to(tl.float32), input_precision="ieee")
    else:
        total = tl.dot(p.to(q.dtype), v.to(q.dtype), total, input_precision="ieee")
    return higher, weight, total


@triton.jit
def _tiles(
    q,
    top,
    weight,
    total,
    begin,
    end,
    position,
    table_ptr,
    k_ptr,
    v_ptr,
    kv,
    scale,
    KV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """_tile from begin to end. Only a `for` is pipelined by the compiler, and only a `while` takes
    bounds of run time in the interpreter."""
    if PLAIN:
        start = begin
        while start < end:
            top, weight, total = _tile(
                q, top, weight, total, start, end, position, table_ptr, k_ptr, v_ptr, kv, scale,
                KV, D, PAGE, WINDOW, BLOCK_N, MASKED, PLAIN,
            )  # fmt: skip
            start += BLOCK_N
    else:
        for start in range(begin, end, BLOCK_N):
            top, weight, total = _tile(
                q, top, weight, total, start, end, position, table_ptr, k_ptr, v_ptr, kv, scale,
                KV, D, PAGE, WINDOW, BLOCK_N, MASKED, PLAIN,
            )  # fmt: skip
    return top, weight, total


@triton.jit(do_not_specialize=["B", "pages"])
def prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    lengths_ptr,
    tables_ptr,
    sinks_ptr,
    out_ptr,
    B,
    pages,
    scale,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
    PLAIN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_Q tokens of one sequence, the GROUP query heads of one key head:
    BLOCK_M >= BLOCK_Q * GROUP rows that share each key. Sequence b's blocks begin at
    starts[b] // BLOCK_Q + b, so that the grid has a static size and some programs leave at once.
    SEARCH: 2**SEARCH > B. Programs with the most keys start first.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    kv = tl.program_id(0)
    b = 0
    beyond = B
    for _ in tl.static_range(SEARCH):
        middle = (b + beyond) // 2
        here = tl.load(starts_ptr + middle) // BLOCK_Q + middle <= block
        b = tl.where(here, middle, b)
        beyond = tl.where(here, beyond, middle)
    begin = tl.load(starts_ptr + b)
    count = tl.load(starts_ptr + b + 1) - begin
    offset = (block - begin // BLOCK_Q - b) * BLOCK_Q
    if offset >= count:
        return
    past = tl.load(lengths_ptr + b) - count
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    t = offset + m // GROUP
    real = (m < BLOCK_Q * GROUP) & (t < count)
    head = kv * GROUP + m % GROUP
    at = ((begin + t).to(tl.int64) * (KV * GROUP) + head)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
    # The sink is a key that every query sees and that has no value.
    top = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
    weight = tl.full([BLOCK_M], 1.0, tl.float32)
    total = tl.zeros([BLOCK_M, D], tl.float32)
    position = past + t
    lowest = past + offset
    end = past + tl.minimum(offset + BLOCK_Q, count)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(lowest - WINDOW + 1, 0)
        whole = first
    else:
        whole = (lowest + 1) // BLOCK_N * BLOCK_N
        top, weight, total = _tiles(
            q, top, weight, total, first, whole, position, tables_ptr + b * pages, k_ptr, v_ptr,
            kv, scale, KV, D, PAGE, WINDOW, BLOCK_N, False, PLAIN,
        )  # fmt: skip
    top, weight, total = _tiles(
        q, top, weight, total, whole, end, position, tables_ptr + b * pages, k_ptr, v_ptr,
        kv, scale, KV, D, PAGE, WINDOW, BLOCK_N, True, PLAIN,
    )  # fmt: skip
    total = total / weight[:, None]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=real[:, None])
