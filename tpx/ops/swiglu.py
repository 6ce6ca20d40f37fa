"""The experts' activation: the torch reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import native


def swiglu(x_RG: Tensor, alpha: float, limit: float) -> Tensor:
    """h_RF, F = G/2, of gate and up interleaved: gate * sigmoid(alpha * gate) * (up + 1).

    First the gate is held to at most `limit` and up to [-limit, limit] (arXiv 2508.10925). Computed
    in float32 at least and rounded once.
    """
    if (fast := native(x_RG)) is not None:
        return fast.swiglu(x_RG, alpha, limit)
    wide = x_RG.to(torch.promote_types(x_RG.dtype, torch.float32))
    gate, up = wide[..., 0::2], wide[..., 1::2]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * (alpha * gate).sigmoid() * (up + 1)).to(x_RG.dtype)
