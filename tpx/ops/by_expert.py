"""The order of pairs (token, k) by expert: the torch reference. Knows no rank and no routing."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import INTEGERS, native


def sort_by_expert(local_N: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """order_N: pairs by expert, those of one in their own order. counts_e: pairs of each expert.

    local_N: int64, each pair's expert, `experts` for one that is elsewhere: those come last and are
    not counted.
    """
    if (fast := native(local_N, dtypes=INTEGERS)) is not None:
        return fast.sort_by_expert(local_N, experts)
    count = local_N.new_zeros(experts + 1)
    count.scatter_add_(0, local_N, torch.ones_like(local_N))  # bincount would wait for the device
    return local_N.argsort(stable=True), count[:experts]


def inverse(order_N: Tensor) -> Tensor:
    """Where each of 0 to N - 1 stands in the permutation order_N."""
    if (fast := native(order_N, dtypes=INTEGERS)) is not None:
        return fast.inverse(order_N)
    places = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, places)
