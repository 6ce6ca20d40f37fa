"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .cpu import native
from .kernel import Kernel
from .linear import linear
from .rms_norm import rms_norm


class Routing(NamedTuple):
    """expert_ids_TK, int64 or int32, the likeliest first; weights_TK in the model's dtype, rows
    sum to 1."""

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


class Router(NamedTuple):
    """norm_D and eps: of the norm before it."""

    norm_D: Tensor
    eps: float
    w_ED: Tensor
    b_E: Tensor
    top_k: int


def norm_route(x_TD: Tensor, router: Router, kernel: Kernel = None) -> tuple[Tensor, Routing]:
    """(h_TD, routing): rms_norm(x), and where that goes."""
    norm_D, eps, w_ED, b_E, top_k = router
    if kernel is not None:
        h_TD, *chosen = kernel.route(x_TD, kernel.Router(w_ED, b_E, top_k, norm_D, eps))
        return h_TD, Routing(*chosen)
    h_TD = rms_norm(x_TD, norm_D, eps)
    return h_TD, route(h_TD, w_ED, b_E, top_k)
