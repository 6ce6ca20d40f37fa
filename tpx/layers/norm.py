"""RMSNorm with its weight, which every rank holds whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.kernel import REFERENCE, Kernels
from ..ops.rms_norm import residual_norm, rms_norm


class RMSNorm(nn.Module):
    """See ops.rms_norm. width: of the last dimension."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, kernels: Kernels = REFERENCE):
        super().__init__()
        self.eps, self.kernel = eps, kernels.get("norm")
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.kernel)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual + x, the norm of that)."""
        return residual_norm(x, residual, self.weight, self.eps, self.kernel)
