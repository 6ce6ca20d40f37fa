"""The package's functions: torch.ops.<namespace>.* with their arguments in records.

T tokens, D hidden, E experts of the model, e of them held, K top-k, F intermediate units held,
S parts of a sum, N = T * K pairs (token * K + k).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import ops
from .packing import Packed


class Router(NamedTuple):
    """w_ED and b_E; norm_D, where the norm before the router is to be computed too; its eps."""

    w_ED: Tensor
    b_E: Tensor
    top_k: int
    norm_D: Tensor | None = None
    eps: float = 1e-5


class Experts(NamedTuple):
    """gate_up of 2F rows in pairs and D columns, down of D rows and F columns; biases [e, 2F] and
    [e, D], or none; the constants of SwiGLU. slot_E int32: where an expert of the model is held,
    -1: not here; none: all are, in order. safe: unpack elementwise (self_test says)."""

    gate_up: Packed
    down: Packed
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    alpha: float = 1.702
    limit: float = 7.0
    slot_E: Tensor | None = None
    safe: bool = False


def route(x_TD: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor]:
    """h_TD = rms_norm(x) (x itself without a norm); ids_TK int32 of the largest logits of h, of
    equal ones the lower id first; weights_TK, the softmax over those, in x's dtype."""
    h_TD, ids_TK, weights_TK = ops.route(x_TD, *_router(router))
    return x_TD if router.norm_D is None else h_TD, ids_TK, weights_TK


def experts(x_TD: Tensor, ids_TK: Tensor, held: Experts) -> Tensor:
    """y_SND: expert ids_TK[n // K, n % K] applied to token n // K, in parts that reduce adds. A
    token's experts differ. Rows of experts elsewhere hold anything."""
    return ops.experts(x_TD, ids_TK, *_experts(held))


def route_experts(x_TD: Tensor, router: Router, held: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """(y_SND, ids_TK, weights_TK): experts(h, ids) of what route(x) gives, in a launch less where
    tokens are few."""
    y_SND, ids_TK, weights_TK = ops.route_experts(x_TD, *_router(router), *_experts(held))
    return y_SND, ids_TK, weights_TK


def experts_sorted(x_RD: Tensor, counts_e: Tensor, held: Experts) -> Tensor:
    """y_RD of rows sorted by slot, counts_e (on x's device) of each; rows beyond their sum give
    zeros."""
    return ops.experts_sorted(x_RD, counts_e, *_experts(held))


def reduce(
    y_SND: Tensor, ids_TK: Tensor, weights_TK: Tensor, slot_E: Tensor | None = None
) -> Tensor:
    """out_TD: the sum over k of weights_TK times the sum over parts of y; pairs elsewhere are
    zeros. In the weights' dtype, rounded once."""
    return ops.reduce(y_SND, ids_TK, weights_TK, slot_E, None, None, 0.0)[0]


def reduce_residual_norm(
    y_SND: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    residual_TD: Tensor,
    norm_D: Tensor,
    eps: float = 1e-5,
    slot_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_TD, h_TD): residual + reduce(y), rounded once, and rms_norm(out)."""
    return ops.reduce(y_SND, ids_TK, weights_TK, slot_E, residual_TD, norm_D, eps)


def residual_norm(
    x_TD: Tensor, residual_TD: Tensor | None, norm_D: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(out_TD, h_TD): residual + x, rounded once to residual's dtype (x, where there is none), and
    rms_norm(out)."""
    return ops.residual_norm(x_TD, residual_TD, norm_D, eps)


def _router(router: Router) -> tuple[object, ...]:
    return router.norm_D, router.w_ED, router.b_E, router.top_k, router.eps


def _experts(held: Experts) -> tuple[object, ...]:
    up, down = held.gate_up, held.down
    return (
        up.codes, up.scales, up.exact, down.codes, down.scales, down.exact, down.columns,
        held.gate_up_bias, held.down_bias, held.slot_E, held.alpha, held.limit, held.safe,
    )  # fmt: skip
