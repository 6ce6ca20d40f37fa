"""Root mean square normalisation (arXiv 1910.07467), alone and with the sum before it."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import native
from .kernel import Kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernel: Kernel = None) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension.

    All of it, the weight too, in float32 at least, rounded once to x's dtype.
    """
    if kernel is not None:
        normed: Tensor = kernel.residual_norm(x, None, weight, eps)[1]
        return normed
    if (fast := native(x, weight)) is not None:
        return fast.rms_norm(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)


def residual_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kernel: Kernel = None
) -> tuple[Tensor, Tensor]:
    """(residual + x, rms_norm of that)."""
    if kernel is not None:
        total, normed = kernel.residual_norm(x, residual, weight, eps)
        return total, normed
    total = residual + x
    return total, rms_norm(total, weight, eps)
