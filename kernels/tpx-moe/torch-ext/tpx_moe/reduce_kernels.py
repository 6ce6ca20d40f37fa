"""The sum over a token's experts, the residual and the next norm."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def reduce_kernel(
    y, ids, slots, weights, residual, norm, out, normed,
    y_stride, split_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = residual + sum over k of weight * (sum over parts of y), and normed = rms_norm(out), a
    token a program. Sums in float32 in a fixed order, rounded once. Pairs elsewhere are not read.
    TOP_K 0: y [tokens, width] is added as it is."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < WIDTH
    if HAS_NORM:
        g = tl.load(norm + c, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK], tl.float32)
    if HAS_RESIDUAL:
        acc += tl.load(residual + token * WIDTH + c, mask=inside, other=0.0).to(tl.float32)
    if TOP_K == 0:
        acc += tl.load(y + token * y_stride + c, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        here = inside
        if HAS_SLOTS:
            here = inside & (tl.load(slots + tl.load(ids + pair)) >= 0)
        part = tl.zeros([BLOCK], tl.float32)
        for s in tl.static_range(SPLIT):
            at = y + s * split_stride + pair * y_stride
            part += tl.load(at + c, mask=here, other=0.0).to(tl.float32)
        acc += tl.load(weights + pair).to(tl.float32) * part
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + c, rounded, mask=inside)
    if HAS_NORM:
        wide = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
        tl.store(
            normed + token * WIDTH + c,
            (g * (wide * scale)).to(normed.dtype.element_ty),
            mask=inside,
        )
