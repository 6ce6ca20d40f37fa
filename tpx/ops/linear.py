"""Rows times one matrix: torch's own, and the branch into the CPU's code where that is faster."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .cpu import native


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y_TN: x times the transposed weight, plus the bias, in their common dtype."""
    fast = native(x_TK, weight_NK, bias_N)
    if fast is not None and fast.is_faster(x_TK):
        return fast.linear(x_TK, weight_NK, bias_N)
    return F.linear(x_TK, weight_NK, bias_N)
