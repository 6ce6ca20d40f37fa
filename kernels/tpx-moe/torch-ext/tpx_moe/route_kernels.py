"""Norm, router and top-k; and the sorting of pairs (token * top_k + k) by expert."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def keys_of(logits, e, E: tl.constexpr, EXPERTS: tl.constexpr):
    """Logits [R, EXPERTS] as numbers in the same order that differ: of equal logits the lower
    expert's is larger. Columns from E on are -1, below all."""
    if logits.dtype == tl.float32:
        bits = (logits + 0.0).to(tl.int32, bitcast=True).to(tl.int64)  # -0 becomes 0
        order = tl.where(bits < 0, -1 - bits, bits + 2147483648)
    else:
        rounded = (logits.to(tl.float32) + 0.0).to(logits.dtype)
        bits = rounded.to(tl.int16, bitcast=True).to(tl.int32)
        order = tl.where(bits < 0, -1 - bits, bits + 32768)
    return tl.where(e < E, order * EXPERTS + (EXPERTS - 1 - e), -1)


@triton.jit
def top_k_of(keys, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr):
    """The TOP_K largest keys of each row, in order: [R, SLOTS], SLOTS a power of two."""
    k = tl.arange(0, SLOTS)[None, :]
    best = tl.zeros([keys.shape[0], SLOTS], keys.dtype)
    for i in tl.static_range(TOP_K):
        top = tl.max(keys, axis=1)[:, None]
        best = tl.where(k == i, top, best)
        keys = tl.where(keys == top, -1, keys)
    return best


@triton.jit
def id_of(key, EXPERTS: tl.constexpr):
    return (EXPERTS - 1 - key % EXPERTS).to(tl.int32)


@triton.jit
def share_of(best, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, DTYPE: tl.constexpr):
    """The softmax over the logits that the keys [R, SLOTS] were made of, the largest first."""
    order = best // EXPERTS
    if DTYPE == tl.float32:
        bits = tl.where(order >= 2147483648, order - 2147483648, -1 - order)
        value = bits.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        bits = tl.where(order >= 32768, order - 32768, -1 - order)
        value = bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    k = tl.arange(0, best.shape[1])[None, :]
    value = tl.where(k < TOP_K, value, -float("inf"))
    share = tl.exp(value - tl.max(value, axis=1)[:, None])
    return share / tl.sum(share, axis=1)[:, None]


@triton.jit
def store_choice(
    best, row, tokens, ids, weights,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, best.shape[1])[None, :]
    target = row[:, None] * TOP_K + k
    inside = (row < tokens)[:, None] & (k < TOP_K)
    share = share_of(best, EXPERTS, TOP_K, DTYPE)
    tl.store(ids + target, id_of(best, EXPERTS), mask=inside)
    tl.store(weights + target, share.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def chosen_of(
    logits, row, tokens,
    EXPERTS: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Keys of the TOP_K largest logits [tokens, E] of rows: [R, SLOTS]."""
    e = tl.arange(0, EXPERTS)[None, :]
    there = (row < tokens)[:, None] & (e < E)
    values = tl.load(logits + row[:, None] * E + e, mask=there, other=0.0, cache_modifier=".cg")
    return top_k_of(keys_of(values, e, E, EXPERTS), EXPERTS, TOP_K, SLOTS)


@triton.jit
def logits_kernel(
    x, norm, w, b, normed, logits, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, EACH: tl.constexpr,
    HAS_NORM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """For few tokens: logits of EACH experts (program 1) of a token (program 0), all columns at
    once. The router's weights are asked for before the kernel that makes x has ended."""
    e = tl.program_id(1) * EACH + tl.arange(0, EACH)
    c = tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64)
    at = w + e[:, None] * WIDTH + c[None, :]
    here = (e < E)[:, None]
    w0 = tl.load(at, mask=here & (c < WIDTH)[None, :], other=0.0)
    w1 = tl.load(at + BLOCK, mask=here & (c + BLOCK < WIDTH)[None, :], other=0.0)
    w2 = tl.load(at + 2 * BLOCK, mask=here & (c + 2 * BLOCK < WIDTH)[None, :], other=0.0)
    bias = tl.load(b + e, mask=e < E, other=0.0).to(tl.float32)
    if HAS_NORM:
        g0 = tl.load(norm + c, mask=c < WIDTH, other=0.0)
        g1 = tl.load(norm + BLOCK + c, mask=c + BLOCK < WIDTH, other=0.0)
        g2 = tl.load(norm + 2 * BLOCK + c, mask=c + 2 * BLOCK < WIDTH, other=0.0)
    if DEPENDENT:
        gdc_wait()
    x += token * WIDTH
    normed += token * WIDTH
    x0 = tl.load(x + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    x1 = tl.load(x + BLOCK + c, mask=c + BLOCK < WIDTH, other=0.0).to(tl.float32)
    x2 = tl.load(x + 2 * BLOCK + c, mask=c + 2 * BLOCK < WIDTH, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x0 * x0 + x1 * x1 + x2 * x2, axis=0) / WIDTH + eps)
        x0 = _normed(x0, scale, g0, normed, c, WIDTH)
        x1 = _normed(x1, scale, g1, normed, c + BLOCK, WIDTH)
        x2 = _normed(x2, scale, g2, normed, c + 2 * BLOCK, WIDTH)
    sums = w0.to(tl.float32) * x0[None, :]
    sums += w1.to(tl.float32) * x1[None, :]
    sums += w2.to(tl.float32) * x2[None, :]
    total = tl.sum(sums, axis=1) + bias
    if DEPENDENT:  # not before: programs that start beside these would lie unevenly on the device
        gdc_launch_dependents()
    tl.store(logits + token * E + e, total.to(logits.dtype.element_ty), mask=e < E)


@triton.jit
def _normed(x, scale, norm, normed, c, WIDTH: tl.constexpr):
    """A token's columns c after the norm, as they are stored, in float32; program 1 = 0 stores."""
    y = (norm.to(tl.float32) * (x * scale)).to(normed.dtype.element_ty)
    tl.store(normed + c, y, mask=(c < WIDTH) & (tl.program_id(1) == 0))
    return y.to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def choose_kernel(
    logits, ids, weights, tokens,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """ids and weights of the TOP_K largest of each token's logits. ROWS tokens a program."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = chosen_of(logits, row, tokens, EXPERTS, E, TOP_K, SLOTS)
    store_choice(best, row, tokens, ids, weights, EXPERTS, TOP_K, logits.dtype.element_ty)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    x, norm, w, b, normed, ids, weights, tokens, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, E: tl.constexpr,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """For many tokens, ROWS a program, by blocks of columns: once for the norm, once for the
    product."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)
    square = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_NORM:
        # No loop, so that all is asked for at once; in the layout of the product, which the scale
        # else drags into one where threads repeat each other's work.
        for start in tl.static_range(0, WIDTH, BLOCK):
            at, inside = _place(row, start, tokens, WIDTH, BLOCK)
            v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            square += v * v
    scale = tl.rsqrt(tl.sum(square, axis=1) / WIDTH + eps)[:, None]
    logits = tl.zeros([ROWS, EXPERTS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at, inside = _place(row, start, tokens, WIDTH, BLOCK)
        h = tl.load(x + at, mask=inside, other=0.0)
        column = start + tl.arange(0, BLOCK)
        if HAS_NORM:
            g = tl.load(norm + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            h = (g[None, :] * (h.to(tl.float32) * scale)).to(x.dtype.element_ty)
            tl.store(normed + at, h, mask=inside)
        known = (e < E)[None, :] & (column < WIDTH)[:, None]
        u = tl.load(w + e[None, :] * WIDTH + column[:, None], mask=known, other=0.0)
        logits = tl.dot(h, u, logits, input_precision="ieee")
    logits += tl.load(b + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    keys = keys_of(logits.to(x.dtype.element_ty), e[None, :], E, EXPERTS)
    best = top_k_of(keys, EXPERTS, TOP_K, SLOTS)
    store_choice(best, row, tokens, ids, weights, EXPERTS, TOP_K, x.dtype.element_ty)


@triton.jit
def _place(row, start, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of rows' columns from start on, [ROWS, BLOCK], and which of them there are."""
    column = (start + tl.arange(0, BLOCK))[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column
    return at, (row < tokens)[:, None] & (column < WIDTH)


@triton.jit
def sort_kernel(
    ids, slots, order, starts, pairs, span, experts,
    COUNT: tl.constexpr, CHUNK: tl.constexpr, HAS_SLOTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program s, part counts how many pairs go before those of slot s in the part's span, and from
    there on writes these, in their own order, into order. starts[s]: how many have a lower slot;
    starts[experts]: how many are here. COUNT, CHUNK: pairs at a time, to count and to place."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    mine, part = tl.program_id(0), tl.program_id(1)
    first = part * span
    before = tl.zeros([COUNT], tl.int32)
    start = 0
    while start < pairs:
        pair = tl.multiple_of(start, COUNT) + tl.arange(0, COUNT)
        slot = _slot(ids, slots, pair, pairs, HAS_SLOTS)
        lower = (slot >= 0) & (slot < mine)
        before += (lower | ((slot == mine) & (pair < first))).to(tl.int32)
        start += COUNT
    place = tl.sum(before, axis=0)
    if part == 0:
        tl.store(starts + mine, place)
    start = 0
    while start < span:
        pair = tl.multiple_of(first + start, CHUNK) + tl.arange(0, CHUNK)
        match = _slot(ids, slots, pair, pairs, HAS_SLOTS) == mine
        upto = tl.cumsum(match.to(tl.int32), axis=0)
        tl.store(order + place + upto - 1, pair, mask=match)
        place += tl.sum(match.to(tl.int32), axis=0)
        start += CHUNK
    if (mine == experts - 1) & (part == tl.num_programs(1) - 1):
        tl.store(starts + experts, place)


@triton.jit
def _slot(ids, slots, pair, pairs, HAS_SLOTS: tl.constexpr):
    """The slot of each pair's expert, -1 for those elsewhere and beyond the end."""
    slot = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
    if HAS_SLOTS:
        slot = tl.load(slots + slot, mask=slot >= 0, other=-1)
    return slot
