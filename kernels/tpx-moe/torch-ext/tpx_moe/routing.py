"""Where tokens go: launches of the router's kernels and of the sort. Needs triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import Mode
from .route_kernels import choose_kernel, logits_kernel, route_kernel, sort_kernel

FEW_TOKENS = 256  # up to these, a token's logits are computed by many programs
EACH = 2  # experts of one of them


class Sort(NamedTuple):
    """Pairs at a time, to count and to place; programs an expert and warps, at most."""

    count: int
    chunk: int
    parts: int
    warps: int


class Strip(NamedTuple):
    """Tokens of a program, columns of a step of its loop."""

    rows: int
    block: int
    warps: int
    stages: int


SORT = Sort(4096, 2048, 8, 8)
SORT_LEAST = 256
ROUTE = Strip(16, 256, 4, 2)  # where there are many tokens
ROUTE_BYTES = 1 << 16  # of the router's matrix in a step: shared memory has to hold two


class Router(NamedTuple):
    """norm [D] or none, w [E, D], b [E]."""

    norm: Tensor | None
    w: Tensor
    b: Tensor
    top_k: int
    eps: float


class Chosen(NamedTuple):
    """ids [T, K], and weights [T, K] where they matter."""

    ids: Tensor
    weights: Tensor | None


def route(x: Tensor, router: Router, mode: Mode, strip: Strip = ROUTE) -> tuple[Tensor, Chosen]:
    """The normed x, and its experts."""
    norm, w, b, top_k, eps = router
    dependent = mode.dependent
    (tokens, width), experts = x.shape, w.shape[0]
    chosen = not_chosen(x, top_k)
    slots = triton.next_power_of_2(top_k)
    if tokens > FEW_TOKENS and mode.tensor_cores:
        x = x.contiguous()
        h = x if norm is None else x.new_empty(x.shape)
        padded = max(16, triton.next_power_of_2(experts))
        block = min(strip.block, max(16, ROUTE_BYTES // (padded * w.element_size())))
        route_kernel[(triton.cdiv(tokens, strip.rows),)](
            x, norm, w, b, h, *chosen, tokens, eps, WIDTH=width, ROWS=strip.rows, BLOCK=block,
            E=experts, EXPERTS=padded, TOP_K=top_k, SLOTS=slots, HAS_NORM=norm is not None,
            DEPENDENT=dependent, num_warps=strip.warps, num_stages=strip.stages,
            **options(dependent),
        )  # fmt: skip
        return h, chosen
    h, logits = router_logits(x, router, dependent)
    if tokens:
        choose_kernel[(tokens,)](
            logits, *chosen, tokens, ROWS=1, EXPERTS=triton.next_power_of_2(experts), E=experts,
            TOP_K=top_k, SLOTS=slots, DEPENDENT=dependent, num_warps=1, **options(dependent),
        )  # fmt: skip
    return h, chosen


def not_chosen(x: Tensor, top_k: int) -> Chosen:
    """Room for the choice of x's tokens."""
    tokens = x.shape[0]
    return Chosen(x.new_empty(tokens, top_k, dtype=torch.int32), x.new_empty(tokens, top_k))


def router_logits(x: Tensor, router: Router, dependent: bool) -> tuple[Tensor, Tensor]:
    """The normed x, and the router's logits of it [T, E], for few tokens."""
    norm, w, b, _, eps = router
    x = x.contiguous()
    (tokens, width), experts = x.shape, w.shape[0]
    h = x if norm is None else x.new_empty(x.shape)
    logits = x.new_empty(tokens, experts)
    if tokens:
        logits_kernel[(tokens, triton.cdiv(experts, EACH))](
            x, norm, w, b, h, logits, eps, WIDTH=width, E=experts, EACH=EACH,
            BLOCK=triton.next_power_of_2(triton.cdiv(width, 3)), HAS_NORM=norm is not None,
            DEPENDENT=dependent, num_warps=4, **options(dependent),
        )  # fmt: skip
    return h, logits


def sort(
    ids: Tensor, slots: Tensor | None, experts: int, dependent: bool, sizes: Sort = SORT
) -> tuple[Tensor, Tensor]:
    """order [pairs] int32: pairs by slot, in their own order, first those that are here; starts
    [experts + 1] int32: where each slot's begin in it."""
    pairs = ids.numel()
    order = ids.new_empty(pairs, dtype=torch.int32)
    starts = ids.new_empty(experts + 1, dtype=torch.int32)
    most = max(SORT_LEAST, triton.next_power_of_2(pairs))  # each size is a kernel to compile
    count, chunk = min(sizes.count, most), min(sizes.chunk, most)
    span = triton.cdiv(triton.cdiv(pairs, chunk), sizes.parts) * chunk
    sort_kernel[(experts, triton.cdiv(pairs, span))](
        ids, slots, order, starts, pairs, span, experts, COUNT=count, CHUNK=chunk,
        HAS_SLOTS=slots is not None, DEPENDENT=dependent,
        num_warps=max(1, min(sizes.warps, max(count, chunk) // 128)), **options(dependent),
    )  # fmt: skip
    return order, starts


def options(dependent: bool) -> dict[str, bool]:
    """The interpreter takes no launch_pdl, so it is named only where it is used."""
    return {"launch_pdl": True} if dependent else {}
