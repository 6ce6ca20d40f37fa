"""Rows times one matrix: torch's own, the CPU's code where that is faster, or a kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import native
from .kernel import Kernel


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    kernel: Kernel = None,
) -> Tensor:
    """y_TN: x times the transposed weight, plus the bias, plus the residual, in their common dtype
    or in out_dtype. A kernel rounds once, at the end."""
    if kernel is not None:
        terms = (bias_N, residual_TN, None, 0.0, out_dtype)
        y_TN: Tensor = kernel.linear_decode(x_TK, weight_NK, *terms)
        return y_TN
    fast = native(x_TK, weight_NK, bias_N)
    if fast is not None and fast.is_faster(x_TK):
        y_TN = fast.linear(x_TK, weight_NK, bias_N)
    else:
        y_TN = F.linear(x_TK, weight_NK, bias_N)
    if residual_TN is not None:
        y_TN = residual_TN + y_TN
    return y_TN if out_dtype is None else y_TN.to(out_dtype)
