"""Embedding and output head, with the rows of the vocabulary cut over a group.

Cuts need not be equal. They know their group and their range of rows; not what a token means.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..comm import Group
from ..ops.kernel import REFERENCE, Kernels
from ..ops.linear import linear
from ..split import split


class VocabEmbedding(nn.Module):
    """Rows start to stop of the table; a token's row comes from the one rank that holds it."""

    def __init__(self, start: int, stop: int, width: int, group: Group, dtype: torch.dtype):
        super().__init__()
        assert stop > start, f"{start=} {stop=}: a rank without rows has nothing to look up"
        self.start, self.group = start, group
        self.weight = nn.Parameter(torch.empty(stop - start, width, dtype=dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        """h_TD of token ids inside the vocabulary."""
        if self.group.size == 1:
            return F.embedding(ids_T, self.weight)
        rows_T = ids_T - self.start
        elsewhere_T = (rows_T < 0) | (rows_T >= self.weight.shape[0])
        h_TD = F.embedding(rows_T.masked_fill(elsewhere_T, 0), self.weight)
        h_TD = h_TD.masked_fill(elsewhere_T.unsqueeze(-1), 0)
        return self.group.all_reduce(h_TD, "embed")


class VocabHead(nn.Module):
    """Logits over the whole vocabulary; rows of the table are cut over the group by `split`."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        group: Group,
        dtype: torch.dtype,
        kernels: Kernels = REFERENCE,
    ):
        super().__init__()
        self.group, self.kernel = group, kernels.get("linear")
        self.sizes = [stop - start for start, stop in split(vocabulary, group.size)]
        self.weight = nn.Parameter(torch.empty(self.sizes[group.rank], width, dtype=dtype))

    def forward(self, h_MD: Tensor) -> Tensor:
        """logits [M, V] float32, the same on the whole group.

        Computed transposed, so that ranks' rows of the vocabulary simply follow each other; every
        rank goes on alike from the result, so each takes its own rows of the gradient.
        """
        if self.group.size == 1:
            return linear(h_MD, self.weight, out_dtype=torch.float32, kernel=self.kernel)
        h_MD = self.group.copy(h_MD)
        logits_VM = linear(h_MD, self.weight, kernel=self.kernel).t()
        logits_VM = self.group.all_gather(logits_VM, "head", self.sizes, alike=True)
        return logits_VM.t().to(torch.float32, memory_format=torch.contiguous_format)
