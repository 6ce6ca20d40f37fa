"""RMSNorm with its weight, which every rank holds whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """See ops.rms_norm. width: of the last dimension."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
