"""Root mean square normalisation (arXiv 1910.07467): the torch reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension.

    All of it, the weight too, in float32 at least, rounded once to x's dtype.
    """
    if (fast := native(x, weight)) is not None:
        return fast.rms_norm(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)
