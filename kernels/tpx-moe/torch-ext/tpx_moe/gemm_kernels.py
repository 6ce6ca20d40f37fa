"""Rows times their expert's MXFP4 matrix, in decode (few pairs) and sorted by expert (many).

One kernel for both matrices and both ways; weights are the M side of the tensor cores, tokens the
N side, so few tokens cost little. A pair is token * top_k + k.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .pair_kernels import block_of, chosen_pairs, entry_of, known_pairs, one_token, store_chosen
from .unpack_kernels import unpack


@triton.jit(do_not_specialize=["pairs"])
def expert_gemm(
    x, codes, scales, bias, out, logits, ids, weights, slots, order, starts,
    pairs, experts, rows, x_stride, out_stride, split_stride, alpha, limit,
    COLUMNS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, GRANULES: tl.constexpr,
    SPLIT: tl.constexpr, PARTED: tl.constexpr, HALVINGS: tl.constexpr,
    GATED: tl.constexpr, SORTED: tl.constexpr, BY_PAIR: tl.constexpr, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, CHOOSE: tl.constexpr, ALONE: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    DEPENDENT: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out = x times the matrix of each row's expert, of tiles of BN rows by BT tokens.

    GATED: then SwiGLU, into out [places, rows / 2] of x's dtype; x is looked up by token. Else into
    out [SPLIT, pairs, rows]; x by place. The columns are cut in SPLIT parts, the first adds the
    bias.
    SORTED: places are those of `order` (pairs by slot; starts [experts + 1]), program 1 is a block
    of BT places. Else places are pairs, column t of the tile is token t (BT is at least their
    number, SLOTS at least TOP_K), and program 1 is a pair whose slot no earlier pair has (BY_PAIR)
    or a slot. Programs without work leave.
    CHOOSE: the experts of each token, of which there are that many, are chosen here, by its logits
    [tokens, CHOOSE]; where not GATED, which has the time, they are written to ids and weights.
    EXPERTS is at least that, or `experts`. ALONE: of one token, BY_PAIR.
    PARTED: four dots of 16 columns a granule, else one of 64. HALVINGS: how often a tile may be
    halved where so many tokens fit, where SORTED.
    DEPENDENT: launched before the kernel before it has ended. EARLY: that kernel had itself waited
    before it let this one start, so what both read can be read before waiting (past the L1).
    LATE: the next one may start when the product is there, instead of at once. AHEAD: granules of
    codes that are asked for into the L2 before waiting, where EARLY: 0 or a power of two.
    """
    tile = tl.program_id(0)
    part = tile % SPLIT
    tile = tile // SPLIT
    if DEPENDENT and not EARLY:
        _wait(LATE)
    if SORTED:
        slot, place, count, pair = block_of(order, starts, experts, BT, EXPERTS)
        source = pair // TOP_K if GATED else place
        target = place if GATED else pair
        here = tl.arange(0, BT) < count
    else:
        if CHOOSE and ALONE:
            slot, count, target = one_token(logits, slots, BT, TOP_K, CHOOSE, EXPERTS, HAS_SLOTS)
        else:
            if CHOOSE:
                chosen = chosen_pairs(logits, pairs, BT, TOP_K, SLOTS, CHOOSE, EXPERTS)
            else:
                chosen = known_pairs(ids, pairs, BT, TOP_K, SLOTS)
            slot, count, target = entry_of(chosen, slots, TOP_K, BT, SLOTS, BY_PAIR, HAS_SLOTS)
        source = tl.arange(0, BT) if GATED else target
        here = target >= 0
    if DEPENDENT and EARLY and AHEAD > 0:
        _ask(codes, slot, tile, part, count, rows, COLUMNS, BN, SPLIT, AHEAD)
    if CHOOSE and not GATED:
        store_chosen(logits, ids, weights, pairs, BT, TOP_K, SLOTS, CHOOSE, EXPERTS)
    if DEPENDENT and EARLY:
        _wait(LATE)
    if count == 0:
        return
    _halved(
        x, codes, scales, bias, out, slot, tile, part, count, here, source, target, rows, x_stride,
        out_stride, split_stride, alpha, limit, COLUMNS, BN, BT, GRANULES, SPLIT, PARTED, HALVINGS,
        GATED, HAS_BIAS, EXACT, ASM, DEPENDENT and LATE,
    )  # fmt: skip


@triton.jit
def _halved(
    x, codes, scales, bias, out, slot, tile, part, count, here, source, target, rows,
    x_stride, out_stride, split_stride, alpha, limit,
    COLUMNS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, GRANULES: tl.constexpr,
    SPLIT: tl.constexpr, PARTED: tl.constexpr, HALVINGS: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr, THEN_NEXT: tl.constexpr,
):  # fmt: skip
    """The tile, or where its first half has all `count` places that one, and so on, HALVINGS
    times."""
    if HALVINGS > 0 and count <= BT // 2:
        half: tl.constexpr = BT // 2
        fewer: tl.constexpr = HALVINGS - 1
        _halved(
            x, codes, scales, bias, out, slot, tile, part, count, tl.arange(0, half) < count,
            _first(source, BT, half), _first(target, BT, half), rows, x_stride, out_stride,
            split_stride, alpha, limit, COLUMNS, BN, half, GRANULES, SPLIT, PARTED, fewer, GATED,
            HAS_BIAS, EXACT, ASM, THEN_NEXT,
        )  # fmt: skip
    else:
        _tile(
            x, codes, scales, bias, out, slot, tile, part, here, source, target, rows, x_stride,
            out_stride, split_stride, alpha, limit, COLUMNS, BN, BT, GRANULES, SPLIT, PARTED, GATED,
            HAS_BIAS, EXACT, ASM, THEN_NEXT,
        )  # fmt: skip


@triton.jit
def _wait(LATE: tl.constexpr):
    gdc_wait()
    if not LATE:
        gdc_launch_dependents()


@triton.jit
def _ask(
    codes, slot, tile, part, count, rows,
    COLUMNS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Fetches the program's first AHEAD granules into the L2, by lines of 128 bytes: four rows."""
    granules: tl.constexpr = (COLUMNS + 63) // 64
    share: tl.constexpr = ((granules + 1) // 2 + SPLIT - 1) // SPLIT * 2
    line = tl.arange(0, AHEAD * BN // 4)
    row = tile * BN + line % (BN // 4) * 4
    granule = part * share + line // (BN // 4)
    wanted = (count > 0) & (row < rows) & (granule < granules)
    at = (slot.to(tl.int64) * ((rows + 63) // 64) + row // 64) * granules + granule
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0;}",
        "=r,l,r",
        [(codes + at * 1024 + row % 64 * 16).to(tl.int64), wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _tile(
    x, codes, scales, bias, out, slot, tile, part, here, source, target, rows,
    x_stride, out_stride, split_stride, alpha, limit,
    COLUMNS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, GRANULES: tl.constexpr,
    SPLIT: tl.constexpr, PARTED: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr, THEN_NEXT: tl.constexpr,
):  # fmt: skip
    """Rows `source` of x times BN rows of the slot's matrix, to rows `target` of out, where
    `here`."""
    granules: tl.constexpr = (COLUMNS + 63) // 64
    words: tl.constexpr = (granules + 1) // 2
    share: tl.constexpr = (words + SPLIT - 1) // SPLIT * 2
    tiles = (rows + 63) // 64
    r = tl.arange(0, BN)
    row = tile * BN + r
    local = slot.to(tl.int64) * tiles + tl.minimum(row // 64, tiles - 1)
    code_rows = codes + local * (granules * 1024) + row % 64 * 16
    scale_rows = scales + local * (words * 64) + row % 64
    if HAS_BIAS:
        # GATED: the first 8 of 16 rows are gates, which stand at even places (layout.py)
        at = tile * BN + (r // 16 * 16 + r % 8 * 2 + r % 16 // 8 if GATED else r)
        added = tl.load(bias + slot * rows + at, mask=(at < rows) & (part == 0), other=0.0)
    acc = _multiply(
        tl.zeros([BN, BT], tl.float32), x + source.to(tl.int64)[:, None] * x_stride, here[:, None],
        code_rows, scale_rows, part * share, share, COLUMNS, granules, words, BN, BT, GRANULES,
        PARTED, EXACT, ASM,
    )  # fmt: skip
    if THEN_NEXT:
        gdc_launch_dependents()
    if HAS_BIAS:  # used only here, so that the first codes do not wait for it
        acc += added.to(tl.float32)[:, None]
    out += target.to(tl.int64)[None, :] * out_stride
    if GATED:
        column = tile * (BN // 2) + tl.arange(0, BN // 2)
        inside = here[None, :] & (column < rows // 2)[:, None]
        h = _swiglu(acc, alpha, limit, BN, BT)
        tl.store(out + column[:, None], h.to(out.dtype.element_ty), mask=inside)
    else:
        inside = here[None, :] & (row < rows)[:, None]
        out += part * split_stride
        tl.store(out + row[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _first(values, LENGTH: tl.constexpr, HALF: tl.constexpr):
    """The first half of a vector."""
    i = tl.arange(0, LENGTH)
    return tl.sum(tl.where(i[:, None] == tl.arange(0, HALF)[None, :], values[:, None], 0), axis=0)


@triton.jit
def _multiply(
    acc, x_rows, here, code_rows, scale_rows, first,
    SHARE: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr, WORDS: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, GRANULES: tl.constexpr, PARTED: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [BN, BT] float32 and SHARE of ALL granules from `first`, an even one, on. GRANULES, 1 or
    an even number, are one step. Beyond the end codes and scales are read again, and x is zeros."""
    c16 = tl.arange(0, 16)
    c64 = tl.arange(0, 64)
    dtype: tl.constexpr = x_rows.dtype.element_ty
    last = tl.minimum(first + SHARE, ALL)
    for step in range((SHARE + GRANULES - 1) // GRANULES):
        for g in tl.static_range(GRANULES):
            granule = first + step * GRANULES + g
            if g % 2 == 0:
                word = tl.load(scale_rows + tl.minimum(granule // 2, WORDS - 1) * 64)
            s = word >> granule % 2 * 16 if GRANULES == 1 else word
            if EXACT:  # a NaN times the zeros of x beyond the end would stay
                s = tl.where(granule < last, s, 0x7F7F7F7F)
            code = tl.load(code_rows[:, None] + tl.minimum(granule, ALL - 1) * 1024 + c16)
            w0, w1, w2, w3 = unpack(code, s, g % 2, BN, dtype, EXACT, ASM)
            column = granule * 64
            if PARTED:
                x0 = _load(x_rows, column + c16, here, granule < last, COLUMNS)
                x1 = _load(x_rows, column + 16 + c16, here, granule < last, COLUMNS)
                x2 = _load(x_rows, column + 32 + c16, here, granule < last, COLUMNS)
                x3 = _load(x_rows, column + 48 + c16, here, granule < last, COLUMNS)
                acc = tl.dot(w0, x0.T, acc, input_precision="ieee")
                acc = tl.dot(w1, x1.T, acc, input_precision="ieee")
                acc = tl.dot(w2, x2.T, acc, input_precision="ieee")
                acc = tl.dot(w3, x3.T, acc, input_precision="ieee")
            else:
                w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
                w = tl.reshape(tl.permute(w, (0, 2, 3, 1)), [BN, 64])
                x0 = _load(x_rows, column + c64, here, granule < last, COLUMNS)
                acc = tl.dot(w, x0.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _load(x_rows, column, here, inside, COLUMNS: tl.constexpr):
    if COLUMNS % 64 == 0:
        return tl.load(x_rows + column[None, :], mask=here & inside, other=0.0)
    else:
        mask = here & inside & (column < COLUMNS)[None, :]
        return tl.load(x_rows + column[None, :], mask=mask, other=0.0)


@triton.jit
def _swiglu(acc, alpha, limit, BN: tl.constexpr, BT: tl.constexpr):
    """[BN / 2, BT]: gate * sigmoid(alpha * gate) * (up + 1), gate at most limit, up within it. The
    first 8 of every 16 rows of acc are gates, so both lie in one thread (layout.py)."""
    both = tl.permute(tl.reshape(acc, [BN // 16, 2, 8, BT]), (0, 2, 3, 1))
    gate, up = tl.split(both)
    gate = tl.reshape(gate, [BN // 2, BT])
    up = tl.reshape(up, [BN // 2, BT])
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
