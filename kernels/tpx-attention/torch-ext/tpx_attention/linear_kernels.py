"""y = norm(x) @ weight.T + bias + residual for a few rows of x, at the speed of weight's bytes.

`gemv` (1 to 4 rows) holds a program's rows of weight in registers, all of K at once: every byte is
in flight before the first product, and before the wait for the kernel that makes x. `skinny` (to 16
rows) multiplies on the matrix units and may cut K, with partial sums that `reduce` adds in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rms_scale(x_ptr, K, eps, BLOCK_K: tl.constexpr, TILES: tl.constexpr):
    """1 / rms of one row."""
    total = tl.zeros([BLOCK_K], tl.float32)
    for i in tl.static_range(TILES):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        total += x * x
    return tl.rsqrt(tl.sum(total, 0) / K + eps)


@triton.jit
def gemv(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    N,
    K,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_N outputs of all rows; K <= TILES * BLOCK_K."""
    if DEPENDENT:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_ptr = weight_ptr + n.to(tl.int64)[:, None] * K
    tiles = ()
    for i in tl.static_range(TILES):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        tile = tl.load(rows_ptr + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        tiles = tiles + (tile,)  # noqa: RUF005  (the form that triton compiles)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    for t in tl.static_range(ROWS):
        scale = 1.0
        if HAS_NORM:
            scale = _rms_scale(x_ptr + t * K, K, eps, BLOCK_K, TILES)
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for i in tl.static_range(TILES):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + t * K + k, mask=k < K, other=0.0)
            if HAS_NORM:
                g = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
                x = (g * (x.to(tl.float32) * scale)).to(x_ptr.dtype.element_ty)
            total += tiles[i].to(tl.float32) * x.to(tl.float32)[None, :]
        y = tl.sum(total, 1) + bias
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + t * N + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def skinny(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    T,
    N,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PLAIN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_N outputs of all rows over STEPS blocks of K.

    SPLITS == 1: out_ptr is the result [T, N]; else float32 partial sums [SPLITS, T, N].
    """
    if DEPENDENT:
        gdc_launch_dependents()
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    rows_ptr = weight_ptr + n.to(tl.int64)[:, None] * K
    if DEPENDENT:
        gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in range(STEPS):
        k = (split * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(rows_ptr + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(
            x_ptr + t[None, :] * K + k[:, None], mask=(t < T)[None, :] & (k < K)[:, None], other=0.0
        )
        if PLAIN:
            total += tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(w, x, total, input_precision="ieee")
    inside = (n < N)[:, None] & (t < T)[None, :]
    at = t[None, :] * N + n[:, None]
    if SPLITS > 1:
        tl.store(out_ptr + split * T * N + at, total, mask=inside)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    size,
    N,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Adds `skinny`'s partial sums [SPLITS, size] in order, with bias and residual."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * size + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def rms_norm(
    x_ptr,
    norm_ptr,
    out_ptr,
    K,
    eps,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a row; for the row counts that `gemv` does not take."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * K
    scale = _rms_scale(x_ptr + row, K, eps, BLOCK_K, TILES)
    for i in tl.static_range(TILES):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
        g = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + row + k, (g * (x * scale)).to(out_ptr.dtype.element_ty), mask=k < K)
