"""Which pairs a program of expert_gemm computes: those of a slot in decode, or a block of places.

A pair is token * TOP_K + k, a slot the place of an expert that is held here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .route_kernels import chosen_of, id_of, keys_of, store_choice


@triton.jit
def one_token(
    logits, slots,
    BT: tl.constexpr, TOP_K: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """As entry_of, of the only token: the shortest way to its expert number program 1, for which
    the first codes wait."""
    entry = tl.program_id(1)
    e = tl.arange(0, EXPERTS)
    values = tl.load(logits + e, mask=e < E, other=0.0, cache_modifier=".cg")
    keys = keys_of(values, e, E, EXPERTS)
    found = tl.max(keys, axis=0)
    for i in tl.static_range(1, TOP_K):
        keys = tl.where(keys == tl.max(keys, axis=0), -1, keys)
        found = tl.where(entry >= i, tl.max(keys, axis=0), found)
    slot = id_of(found, EXPERTS)
    if HAS_SLOTS:
        slot = tl.load(slots + slot)
    return slot, (slot >= 0).to(tl.int32), tl.where(tl.arange(0, BT) == 0, entry, -1)


@triton.jit
def chosen_pairs(
    logits, pairs,
    BT: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, E: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """The expert of each pair [BT, SLOTS], -1 where there is none."""
    t = tl.arange(0, BT)
    best = chosen_of(logits, t, pairs // TOP_K, EXPERTS, E, TOP_K, SLOTS)
    there = (tl.arange(0, SLOTS)[None, :] < TOP_K) & (t[:, None] * TOP_K < pairs)
    return tl.where(there, id_of(best, EXPERTS), -1)


@triton.jit
def store_chosen(
    logits, ids, weights, pairs,
    BT: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, E: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """Once in the launch: every token's experts and their weights to memory."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        t = tl.arange(0, BT)
        best = chosen_of(logits, t, pairs // TOP_K, EXPERTS, E, TOP_K, SLOTS)
        kind: tl.constexpr = logits.dtype.element_ty
        store_choice(best, t, pairs // TOP_K, ids, weights, EXPERTS, TOP_K, kind)


@triton.jit
def known_pairs(ids, pairs, BT: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr):
    """As chosen_pairs, of ids in memory."""
    k = tl.arange(0, SLOTS)[None, :]
    pair = tl.arange(0, BT)[:, None] * TOP_K + k
    there = (k < TOP_K) & (pair < pairs)
    return tl.load(ids + pair, mask=there, other=-1, cache_modifier=".cg").to(tl.int32)


@triton.jit
def entry_of(
    chosen, slots,
    TOP_K: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr, BY_PAIR: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """The slot that this program computes, its number of pairs (0: none here) and each token's pair
    or -1. Of few numbers, since the first codes wait for it."""
    entry = tl.program_id(1)
    pair = tl.arange(0, BT)[:, None] * TOP_K + tl.arange(0, SLOTS)[None, :]
    if HAS_SLOTS:
        chosen = tl.load(slots + chosen, mask=chosen >= 0, other=-1)
    slot = entry
    if BY_PAIR:
        mine = tl.where((pair == entry) & (chosen >= 0), chosen, -1)
        slot = tl.max(tl.max(mine, axis=1), axis=0)
    match = (chosen == slot) & (chosen >= 0)
    count = tl.sum(tl.sum(match.to(tl.int32), axis=1), axis=0)
    if BY_PAIR:
        earlier = match & (pair < entry)
        count = tl.where(tl.sum(tl.sum(earlier.to(tl.int32), axis=1), axis=0) == 0, count, 0)
    return slot, count, tl.max(tl.where(match, pair, -1), axis=1)


@triton.jit
def block_of(order, starts, experts, BT: tl.constexpr, EXPERTS: tl.constexpr):
    """The slot of block number program 1, its places, how many they are, and their pairs."""
    block = tl.program_id(1)
    e = tl.arange(0, EXPERTS)
    known = e < experts
    start = tl.load(starts + e, mask=known, other=0, cache_modifier=".cg")
    stop = tl.load(starts + e + 1, mask=known, other=0, cache_modifier=".cg")
    blocks = (stop - start + BT - 1) // BT
    upto = tl.cumsum(blocks, axis=0)
    slot = tl.sum((upto <= block).to(tl.int32), axis=0)
    mine = e == slot
    base = tl.sum(tl.where(mine, start + (block - upto + blocks) * BT, 0), axis=0)
    end = tl.sum(tl.where(mine, stop, 0), axis=0)
    count = tl.maximum(tl.minimum(end - base, BT), 0)
    place = base + tl.arange(0, BT)
    here = tl.arange(0, BT) < count
    pair = tl.load(order + place, mask=here, other=0, cache_modifier=".cg")
    return slot, tl.where(here, place, 0), count, pair
