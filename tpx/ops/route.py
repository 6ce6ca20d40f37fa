"""Which experts a token goes to, and with what weight: the torch reference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .cpu import native
from .linear import linear


class Routing(NamedTuple):
    """expert_ids_TK int64, the likeliest first; weights_TK in the model's dtype, rows sum to 1."""

    expert_ids_TK: Tensor
    weights_TK: Tensor


def route(h_TD: Tensor, w_ED: Tensor, b_E: Tensor, top_k: int) -> Routing:
    """The top_k largest logits of each token and the softmax over those alone.

    Of equal logits the lower expert id comes first, on every device: a stable sort, where
    torch.topk promises no order.
    """
    logits_TE = linear(h_TD, w_ED, b_E)
    if (fast := native(logits_TE)) is not None:
        return Routing(*fast.route(logits_TE, top_k))
    chosen_TE, ids_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
    return Routing(ids_TE[:, :top_k].contiguous(), chosen_TE[:, :top_k].softmax(dim=-1))
