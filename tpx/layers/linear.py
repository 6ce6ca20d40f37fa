"""Linear layers whose outputs (Colwise) or inputs (Rowwise) are cut over a group of ranks.

Weights are [outputs, inputs]. They know their group and their local sizes; not who cut them. What
every rank holds whole is torch's own nn.Linear.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..comm import Group
from ..ops.kernel import REFERENCE, Kernels
from ..ops.linear import linear


class Colwise(nn.Module):
    """This rank's outputs of x_TK, which is the same on the whole group.

    Named after the columns of W^T. outputs: those of this rank.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        group: Group,
        dtype: torch.dtype,
        kernels: Kernels = REFERENCE,
    ):
        super().__init__()
        self.group, self.kernel = group, kernels.get("linear")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype))

    def forward(self, x_TK: Tensor) -> Tensor:
        x_TK = self.group.copy(x_TK)
        return linear(x_TK, self.weight, self.bias, kernel=self.kernel)


class Rowwise(nn.Module):
    """All outputs of an input that is cut over the group: partial sums, added by one all-reduce.

    The bias is whole on every rank and added once, after the sum. inputs: those of this rank.
    name: what the all-reduce is called in records.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        group: Group,
        name: str,
        dtype: torch.dtype,
        kernels: Kernels = REFERENCE,
    ):
        super().__init__()
        self.group, self.name, self.kernel = group, name, kernels.get("linear")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype))

    def forward(self, x_TK: Tensor, residual_TN: Tensor) -> Tensor:
        """With the residual added, the same on the whole group."""
        if self.kernel is not None and self.group.size == 1:
            return linear(x_TK, self.weight, self.bias, residual_TN, kernel=self.kernel)
        partial_TN = linear(x_TK, self.weight, kernel=self.kernel)
        return residual_TN + (self.group.all_reduce(partial_TN, self.name) + self.bias)
