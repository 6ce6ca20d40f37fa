"""Attention of one new token a sequence over a paged cache, its keys cut over programs.

A program has one sequence, one key head with the GROUP query heads that read it, and one run of
positions. With NEW it also turns q and the new k by their angles and puts k and v into the cache:
the program of the first run does so and takes them from registers, so nobody reads what this very
launch writes. The sink enters once: here where there is one run, else in `combine`.
Log2 units: scores are multiplied by log2(e) / sqrt(D).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def turned(x_ptr, row, d, cos_ptr, sin_ptr, at, D: tl.constexpr):
    """Rows of x with each pair (d, d + D/2) turned; float32. row: offsets of the rows; at: of the
    token's angles."""
    HALF: tl.constexpr = D // 2
    c = tl.load(cos_ptr + at + d % HALF).to(tl.float32)
    s = tl.load(sin_ptr + at + d % HALF).to(tl.float32)
    s = tl.where(d < HALF, -s, s)
    x = tl.load(x_ptr + row + d).to(tl.float32)
    other = tl.load(x_ptr + row + (d + HALF) % D).to(tl.float32)
    return x * c + other * s


@triton.jit
def cached(x, ptr):
    """x as the cache holds it; what float8 cannot hold becomes its largest value."""
    if ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0)
    return x.to(ptr.dtype.element_ty)


@triton.jit
def _rows(table_ptr, position, stop, kv, KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    """Offsets in the cache of one key head's rows at `position`; those from stop on are not
    looked up."""
    page = tl.load(table_ptr + position // PAGE, mask=position < stop, other=0).to(tl.int64)
    return ((page * PAGE + position % PAGE) * KV + kv) * D


@triton.jit
def decode(
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    q_stride,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    pages,
    scale,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    NEW: tl.constexpr,
    EARLY: tl.constexpr,
    PLAIN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """HEADS: GROUP padded for the matrix units. WINDOW 0: none. pages: row length of tables.

    EARLY: tables, lengths, the cache's older entries and sinks were complete before the kernel
    ahead of this one, so they are fetched before the wait for it.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    b, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, g, s = tl.arange(0, D), tl.arange(0, HEADS), tl.arange(0, BLOCK)
    length = tl.load(lengths_ptr + b)
    stop = length
    if NEW:
        stop = length - 1
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - low, 0), SPLITS), BLOCK) * BLOCK
    first = low + split * share
    stop = tl.minimum(first + share, stop)
    table_ptr = tables_ptr + b * pages
    position = first + s
    rows = _rows(table_ptr, position, stop, kv, KV, D, PAGE)
    inside = (position < stop)[:, None]
    k = tl.load(k_ptr + rows[:, None] + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + rows[:, None] + d[None, :], mask=inside, other=0.0)
    head = kv * GROUP + g
    sink = tl.load(sinks_ptr + head, mask=g < GROUP, other=0.0).to(tl.float32) * LOG2E
    if DEPENDENT:
        if EARLY:
            gdc_wait()

    top = tl.full([HEADS], -float("inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, D], tl.float32)
    q_row = (b * q_stride + tl.where(g < GROUP, head, kv * GROUP) * D)[:, None]
    if NEW:
        q = turned(q_ptr, q_row, d[None, :], cos_ptr, sin_ptr, b * (D // 2), D)
        q = q.to(q_ptr.dtype.element_ty)
        if (split == 0) & (length > 0):
            new = b * q_stride + kv * D
            k_new = turned(k_new_ptr, new, d, cos_ptr, sin_ptr, b * (D // 2), D)
            k_new = cached(k_new.to(k_new_ptr.dtype.element_ty).to(tl.float32), k_ptr)
            v_new = cached(tl.load(v_new_ptr + new + d).to(tl.float32), v_ptr)
            slot = tl.load(slots_ptr + b)
            tl.store(k_ptr + (slot * KV + kv) * D + d, k_new)
            tl.store(v_ptr + (slot * KV + kv) * D + d, v_new)
            top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
            weight += 1.0
            total += v_new.to(tl.float32)[None, :]
    else:
        q = tl.load(q_ptr + q_row + d[None, :])

    start = first
    while start < stop:  # fetches one block ahead by hand
        ahead = start + BLOCK + s
        rows = _rows(table_ptr, ahead, stop, kv, KV, D, PAGE)
        inside = (ahead < stop)[:, None]
        k_next = tl.load(k_ptr + rows[:, None] + d[None, :], mask=inside, other=0.0)
        v_next = tl.load(v_ptr + rows[:, None] + d[None, :], mask=inside, other=0.0)
        if PLAIN:
            scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        scores = tl.where((start + s < stop)[None, :], scores * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(p, 1)
        total = total * fade[:, None]
        if PLAIN:
            total += tl.dot(p, v.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(p.to(q.dtype), v.to(q.dtype), total, input_precision="ieee")
        top = higher
        k = k_next
        v = v_next
        start += BLOCK

    if SPLITS == 1:
        higher = tl.maximum(top, sink)
        fade = tl.exp2(top - higher)
        total = total * (fade / (weight * fade + tl.exp2(sink - higher)))[:, None]
        out = out_ptr + (b * KV * GROUP + head)[:, None] * D + d[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(g < GROUP)[:, None])
    else:
        run = (b * KV * GROUP + head) * SPLITS + split
        safe = tl.where(weight > 0, weight, 1.0)  # a run may have no key
        tl.store(lse_ptr + run, top + tl.log2(safe), mask=g < GROUP)
        total = total / safe[:, None]
        tl.store(part_ptr + run[:, None] * D + d[None, :], total, mask=(g < GROUP)[:, None])


@triton.jit
def combine(
    part_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    H,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a sequence and query head: the runs' outputs by their weights, and the sink."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    d, s = tl.arange(0, D), tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + row * SPLITS + s, mask=s < SPLITS, other=-float("inf"))
    sink = tl.load(sinks_ptr + row % H).to(tl.float32) * LOG2E
    top = tl.maximum(tl.max(lse, 0), sink)
    share = tl.exp2(lse - top)
    part = tl.load(
        part_ptr + (row * SPLITS + s)[:, None] * D + d[None, :],
        mask=(lse > -float("inf"))[:, None],
        other=0.0,
    )
    out = tl.sum(part * share[:, None], 0) / (tl.sum(share, 0) + tl.exp2(sink - top))
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty))
