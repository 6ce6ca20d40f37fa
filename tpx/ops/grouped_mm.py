"""Rows times their expert's matrix: the torch reference, and the branch into the CPU's own code.

Knows nothing of routing or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..mxfp4 import Mxfp4, dequantize
from .cpu import native


def grouped_mm(
    x_RD: Tensor, counts_e: Tensor, weight: Mxfp4 | Tensor, bias_eN: Tensor | None
) -> Tensor:
    """y_RN: row r times the matrix of its expert, plus that expert's bias, in x's dtype.

    x_RD       rows sorted by expert: the first counts_e[0] are expert 0's, and so on
    counts_e   int64 [e], on x's device or on the CPU; rows beyond their sum give zeros
    weight     Mxfp4 [e, N, K/32, 16], a row an output; or plain [e, K, N], a row an input
    Differentiable in x alone: weight and bias are frozen and get no gradient. At most one expert is
    dequantised at any time, in backward too.
    """
    counts = counts_e.tolist()
    assert sum(counts) <= x_RD.shape[0], f"{counts=} are more than {x_RD.shape[0]} rows"
    packed, scales = weight if isinstance(weight, Mxfp4) else (weight, None)
    assert len(counts) == packed.shape[0], f"{len(counts)} counts for {packed.shape[0]} experts"
    if isinstance(weight, Mxfp4) and (fast := native(x_RD, bias_eN)) is not None:
        return fast.grouped_mm(x_RD, counts, weight, bias_eN)
    apply: Callable[..., Tensor] = _GroupedMM.apply
    return apply(x_RD, counts, packed, scales, bias_eN)


class _GroupedMM(torch.autograd.Function):
    """Dequantises again in backward instead of keeping what forward dequantised."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        counts: list[int],
        packed: Tensor,
        scales: Tensor | None,
        bias_eN: Tensor | None,
    ) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(packed, scales)
        outputs = packed.shape[2 if scales is None else 1]
        y_RN = x_RD.new_zeros(x_RD.shape[0], outputs)
        for e, rows in _rows(counts):
            y_RN[rows] = x_RD[rows] @ _matrix(packed, scales, e, x_RD.dtype)
            if bias_eN is not None:
                y_RN[rows] += bias_eN[e]
        return y_RN

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        inputs = packed.shape[1] if scales is None else scales.shape[2] * 32
        grad_RD = grad_RN.new_zeros(grad_RN.shape[0], inputs)
        for e, rows in _rows(ctx.counts):
            grad_RD[rows] = grad_RN[rows] @ _matrix(packed, scales, e, grad_RN.dtype).t()
        return grad_RD, None, None, None, None


def _rows(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of the experts that have rows."""
    found, start = [], 0
    for e, count in enumerate(counts):
        if count:
            found.append((e, slice(start, start + count)))
        start += count
    return found


def _matrix(packed: Tensor, scales: Tensor | None, e: int, dtype: torch.dtype) -> Tensor:
    """Expert e's [K, N]. The caller must not name it, or two would be alive at a time."""
    if scales is None:
        return packed[e].to(dtype)
    return dequantize(Mxfp4(packed[e], scales[e]), dtype).t()
