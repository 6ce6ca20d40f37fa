"""What every operation of this package computes, in torch alone: for tests, and where no kernel can
run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import Packed, unpack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """[e, rows, columns]: code times 2**(scale - 127), scale byte 255 as NaN."""
    blocks, scales = unpack(packed)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.tensor(E2M1, dtype=wide, device=blocks.device)[codes.int()]
    factor = scales.view(torch.float8_e8m0fnu).to(wide).unsqueeze(-1)
    return (values * factor).flatten(-2).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight, in float32 at least, rounded once to x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)


def route(
    x: Tensor, norm: Tensor | None, w: Tensor, b: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed x (x itself without `norm`), ids [T, top_k] int32 and their weights."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    logits = F.linear(x, w, b)
    chosen, ids = logits.sort(dim=-1, descending=True, stable=True)
    weights = chosen[:, :top_k].float().softmax(dim=-1).to(x.dtype)
    return x, ids[:, :top_k].int(), weights


def experts(
    x: Tensor,
    ids: Tensor,
    gate_up: Packed,
    down: Packed,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    slots: Tensor | None,
    alpha: float,
    limit: float,
) -> Tensor:
    """y [1, T * top_k, rows of down] of x's dtype: each pair's expert; zeros for those not here."""
    top_k = ids.shape[1]
    slot = ids.flatten().long() if slots is None else slots[ids.flatten().long()].long()
    y = x.new_zeros(slot.shape[0], down.rows)
    for e in slot.unique().tolist():
        if e < 0:
            continue
        pair = (slot == e).nonzero().flatten()
        g = F.linear(x[pair // top_k], dequantize(_expert(gate_up, e), x.dtype)[0])
        g = swiglu(g if gate_up_bias is None else g + gate_up_bias[e], alpha, limit)
        z = F.linear(g, dequantize(_expert(down, e), x.dtype)[0])
        y[pair] = z if down_bias is None else z + down_bias[e]
    return y.unsqueeze(0)


def experts_sorted(
    x: Tensor,
    counts: Tensor,
    gate_up: Packed,
    down: Packed,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    _slots: Tensor | None,
    alpha: float,
    limit: float,
) -> Tensor:
    """y [R, rows of down] of rows sorted by slot; zeros for rows beyond the counts' sum."""
    slots = torch.arange(len(counts) + 1, dtype=torch.int32, device=x.device)
    slots[-1] = -1
    rest = (x.shape[0] - counts.sum()).reshape(1)
    ids = slots.new_tensor(range(len(counts) + 1)).repeat_interleave(torch.cat([counts, rest]))
    both = (gate_up_bias, down_bias, slots, alpha, limit)
    return experts(x, ids.unsqueeze(1), gate_up, down, *both)[0]


def swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), of gate and up interleaved; gate at most limit, up
    within it (arXiv 2508.10925)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gate, up = wide[..., 0::2].clamp(max=limit), wide[..., 1::2].clamp(-limit, limit)
    return (gate * (alpha * gate).sigmoid() * (up + 1)).to(x.dtype)


def reduce(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    slots: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out [T, D] = residual + sum over k of weight * (sum over parts of y), and its rms_norm (out
    itself without `norm`), of the weights' dtype. Pairs elsewhere count as zeros, whatever y
    holds."""
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.to(wide).sum(0).view(*ids.shape, -1)
    if slots is not None:
        total = total.masked_fill((slots[ids.long()] < 0).unsqueeze(-1), 0)
    out = (weights.to(wide).unsqueeze(-1) * total).sum(1)
    if residual is not None:
        out = out + residual
    out = out.to(weights.dtype)
    return out, out if norm is None else rms_norm(out, norm, eps)


def residual_norm(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, rounded once to residual's dtype, and its rms_norm."""
    out = x.clone() if residual is None else (x.float() + residual.float()).to(residual.dtype)
    return out, rms_norm(out, norm, eps)


def _expert(packed: Packed, e: int) -> Packed:
    return packed._replace(codes=packed.codes[e : e + 1], scales=packed.scales[e : e + 1])
