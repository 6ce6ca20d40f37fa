"""Draws tokens on the device: greedy, temperature, top-k, top-p, at a given uniform number a row.

A token's mass is exp((logit - peak) / temperature) as a whole number of 2**-44: sums do not depend
on their order, so any cut of the vocabulary, and any order of atomic additions, gives the same
token. What top-k and top-p keep is found digit by digit: `search` adds up how much lies above each
of a digit's 16 ranges, of the keys that are still in question; the next launch picks the range.
Keys are the logits' bits, ordered as unsigned numbers of 32 bits.

A program has one row and one CHUNK of its vocabulary. A threshold is (key, ties): tokens above key
are kept, and of those equal to it the first `ties` by id.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DIGITS: tl.constexpr = tl.constexpr(8)
UNIT: tl.constexpr = tl.constexpr(17592186044416.0)  # 2**44


@triton.jit
def _key(x):
    """int64 in [0, 2**32), in the order of x; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _logit(key):
    """The number whose key it is."""
    bits = (key - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, peak, temperature):
    z = (x.to(tl.float64) - peak.to(tl.float64)) / temperature
    return (tl.exp(z) * UNIT + 0.5).to(tl.int64)


@triton.jit
def _chunk(logits_ptr, row, V, CHUNK: tl.constexpr):
    """(logits, -inf past the vocabulary; ids) of this program."""
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=-float("inf"))
    return x.to(tl.float32), ids


@triton.jit
def _sums(ptr, row, chunks, CHUNKS: tl.constexpr):
    c = tl.arange(0, CHUNKS)
    return tl.load(ptr + row * chunks + c, mask=c < chunks, other=0)


@triton.jit
def _peak(peaks_ptr, row, chunks, CHUNKS: tl.constexpr):
    c = tl.arange(0, CHUNKS)
    return tl.max(tl.load(peaks_ptr + row * chunks + c, mask=c < chunks, other=-float("inf")), 0)


@triton.jit
def _narrow(low, above, parts_ptr, row, goal, shift):
    """(low of the range that holds the threshold, how much lies above that range) from the low of
    all 16 ranges and how much lies above them."""
    j = tl.arange(0, 16)
    parts = tl.load(parts_ptr + row * 16 + j) + above
    digit = tl.sum((parts >= goal).to(tl.int64), 0)
    return low + (digit << shift), tl.sum(tl.where(j == digit, parts, 0), 0)


@triton.jit
def _goal(row, keys_ptr, ties_ptr, kept_ptr, top_p, peak, temperature):
    """Top-p's goal in units of mass, out of what top-k has kept."""
    key, ties = tl.load(keys_ptr + row), tl.load(ties_ptr + row)
    kept = tl.load(kept_ptr + row)
    if ties > 0:
        kept += ties * _mass(_logit(key), peak, temperature)
    return tl.maximum(tl.ceil(top_p * kept.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def peaks(
    logits_ptr, peaks_ptr, firsts_ptr, V, chunks, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Each chunk's largest logit and the first id that has it."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    x, ids = _chunk(logits_ptr, row, V, CHUNK)
    peak = tl.max(x, 0)
    at = row * chunks + tl.program_id(1)
    tl.store(peaks_ptr + at, peak)
    tl.store(firsts_ptr + at, tl.min(tl.where((x == peak) & (ids < V), ids, V), 0))


@triton.jit(do_not_specialize=["digit"])
def search(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    tops_ptr,
    lows_ptr,
    aboves_ptr,
    parts_ptr,
    keys_ptr,
    ties_ptr,
    kept_ptr,
    V,
    B,
    digit,
    CHUNK: tl.constexpr,
    BY_MASS: tl.constexpr,
    FIRST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Measures one digit's ranges: counts for top-k, masses for top-p. FIRST: digit is 0.

    parts_ptr [DIGITS, B, 16], zero before the first; lows_ptr, aboves_ptr [DIGITS, B]: where a
    digit's ranges begin, how much lies above them.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if BY_MASS:
        peak = tl.load(tops_ptr + row)
        if (temperature <= 0) | (top_p >= 1):
            return
    else:
        if (temperature <= 0) | (top_k <= 0):
            return
    x, ids = _chunk(logits_ptr, row, V, CHUNK)
    low = tl.zeros([], tl.int64)
    above = tl.zeros([], tl.int64)
    if not FIRST:
        goal = tl.minimum(top_k, V).to(tl.int64)
        if BY_MASS:
            goal = _goal(row, keys_ptr, ties_ptr, kept_ptr, top_p, peak, temperature)
        at = (digit - 1) * B + row
        low, above = tl.load(lows_ptr + at), tl.load(aboves_ptr + at)
        low, above = _narrow(low, above, parts_ptr, at, goal, 32 - 4 * digit)
    if tl.program_id(1) == 0:
        tl.store(lows_ptr + digit * B + row, low)
        tl.store(aboves_ptr + digit * B + row, above)
    range_ = (_key(x) - low) >> (28 - 4 * digit)
    asked = (ids < V) & (range_ >= 0) & (range_ < 16)
    if tl.max(asked.to(tl.int32), 0) > 0:
        if BY_MASS:
            amount = tl.where(asked, _mass(x, peak, temperature), 0)
        else:
            amount = asked.to(tl.int32)
        for j in tl.static_range(15):  # nothing in question lies above the last
            part = tl.sum(tl.where(range_ > j, amount, 0), 0).to(tl.int64)
            tl.atomic_add(parts_ptr + (digit * B + row) * 16 + j, part, sem="relaxed")


@triton.jit
def tally(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    peaks_ptr,
    tops_ptr,
    lows_ptr,
    aboves_ptr,
    parts_ptr,
    keys_ptr,
    ties_ptr,
    kept_ptr,
    masses_ptr,
    equals_ptr,
    V,
    B,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Ends a search (BY_COUNT: top-k's, BY_MASS: top-p's, neither: there was none): the
    threshold, and each chunk's mass above it and number of tokens equal to it.

    keys_ptr, ties_ptr [2, B]: the threshold before top-p and after it. kept_ptr: a row's mass above
    the first, zero before; tops_ptr: its largest logit.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row, c = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0:
        return
    peak = _peak(peaks_ptr, row, chunks, CHUNKS)
    threshold = tl.full([], -1, tl.int64)
    ties = tl.zeros([], tl.int64)
    slot = row
    last = (DIGITS - 1) * B + row
    if BY_COUNT:
        goal = tl.minimum(tl.load(top_k_ptr + row), V)
        if goal > 0:
            low, above = tl.load(lows_ptr + last), tl.load(aboves_ptr + last)
            threshold, above = _narrow(low, above, parts_ptr, last, goal, 0)
            ties = goal - above
    if BY_MASS:
        slot = B + row
        top_p = tl.load(top_p_ptr + row)
        threshold, ties = tl.load(keys_ptr + row), tl.load(ties_ptr + row)
        if top_p < 1:
            goal = _goal(row, keys_ptr, ties_ptr, kept_ptr, top_p, peak, temperature)
            low, above = tl.load(lows_ptr + last), tl.load(aboves_ptr + last)
            found, above = _narrow(low, above, parts_ptr, last, goal, 0)
            each = tl.maximum(_mass(_logit(found), peak, temperature), 1)
            needed = (goal - above + each - 1) // each
            ties = tl.where(found == threshold, tl.minimum(ties, needed), needed)
            threshold = found
    if c == 0:
        tl.store(keys_ptr + slot, threshold)
        tl.store(ties_ptr + slot, ties)
        tl.store(tops_ptr + row, peak)
    x, ids = _chunk(logits_ptr, row, V, CHUNK)
    key = _key(x)
    mass = tl.sum(tl.where((ids < V) & (key > threshold), _mass(x, peak, temperature), 0), 0)
    at = row * chunks + c
    tl.store(masses_ptr + at, mass)
    tl.store(equals_ptr + at, tl.sum(((ids < V) & (key == threshold)).to(tl.int64), 0))
    if not BY_MASS:
        tl.atomic_add(kept_ptr + row, mass, sem="relaxed")


@triton.jit
def draw(
    logits_ptr,
    temperature_ptr,
    u_ptr,
    peaks_ptr,
    firsts_ptr,
    keys_ptr,
    ties_ptr,
    masses_ptr,
    equals_ptr,
    ids_ptr,
    V,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a row: the chunk, then the token, where the kept mass by ids passes u of all."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    c = tl.arange(0, CHUNKS)
    peak = _peak(peaks_ptr, row, chunks, CHUNKS)
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0:
        chunk_peaks = tl.load(peaks_ptr + row * chunks + c, mask=c < chunks, other=-float("inf"))
        first = tl.load(firsts_ptr + row * chunks + c, mask=c < chunks, other=V)
        tl.store(ids_ptr + row, tl.min(tl.where(chunk_peaks == peak, first, V), 0).to(tl.int64))
        return
    threshold, ties = tl.load(keys_ptr + row), tl.load(ties_ptr + row)
    each = tl.zeros([], tl.int64)
    if ties > 0:
        each = _mass(_logit(threshold), peak, temperature)
    equals = _sums(equals_ptr, row, chunks, CHUNKS)
    ties_left = tl.maximum(ties - (tl.cumsum(equals, 0) - equals), 0)
    masses = _sums(masses_ptr, row, chunks, CHUNKS) + tl.minimum(ties_left, equals) * each
    passed = tl.cumsum(masses, 0)
    kept = tl.sum(masses, 0)
    goal = (tl.load(u_ptr + row) * kept.to(tl.float64)).to(tl.int64)
    goal = tl.minimum(goal, kept - 1)
    chosen = tl.sum((passed <= goal).to(tl.int32), 0)
    goal -= tl.sum(tl.where(c < chosen, masses, 0), 0)
    ties_here = tl.sum(tl.where(c == chosen, ties_left, 0), 0)
    ids = chosen * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=-float("inf"))
    x = x.to(tl.float32)
    key = _key(x)
    equal = ((ids < V) & (key == threshold)).to(tl.int64)
    mine = (key > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties_here))
    mass = tl.where((ids < V) & mine, _mass(x, peak, temperature), 0)
    before = tl.sum((tl.cumsum(mass, 0) <= goal).to(tl.int32), 0)
    tl.store(ids_ptr + row, (chosen * CHUNK + before).to(tl.int64))
