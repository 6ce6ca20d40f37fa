"""Launches the kernels on given tensors: shapes, grids, buffers. Needs triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .configs import DECODE_TOKENS, Tile, Way, partial_dtype
from .device import Mode
from .gemm_kernels import expert_gemm
from .packing import Packed
from .reduce_kernels import reduce_kernel
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


class Held(NamedTuple):
    """The experts held here: matrices, biases, and where an expert of the model is (-1: nowhere
    here)."""

    gate_up: Packed
    down: Packed
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    slots: Tensor | None
    alpha: float
    limit: float


def route(x: Tensor, router: Router, mode: Mode, strip: Strip = ROUTE) -> tuple[Tensor, Chosen]:
    """The normed x, and its experts."""
    norm, w, b, top_k, eps = router
    dependent = mode.dependent
    (tokens, width), experts = x.shape, w.shape[0]
    chosen = _chosen(x, top_k)
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
            **_options(dependent),
        )  # fmt: skip
        return h, chosen
    h, logits = _logits(x, router, dependent)
    if tokens:
        choose_kernel[(tokens,)](
            logits, *chosen, tokens, ROWS=1, EXPERTS=triton.next_power_of_2(experts), E=experts,
            TOP_K=top_k, SLOTS=slots, DEPENDENT=dependent, num_warps=1, **_options(dependent),
        )  # fmt: skip
    return h, chosen


def _chosen(x: Tensor, top_k: int) -> Chosen:
    tokens = x.shape[0]
    return Chosen(x.new_empty(tokens, top_k, dtype=torch.int32), x.new_empty(tokens, top_k))


def _logits(x: Tensor, router: Router, dependent: bool) -> tuple[Tensor, Tensor]:
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
            DEPENDENT=dependent, num_warps=4, **_options(dependent),
        )  # fmt: skip
    return h, logits


def route_experts(
    x: Tensor, router: Router, held: Held, way: Way, mode: Mode
) -> tuple[Tensor, Chosen]:
    """y as `experts` gives it for rms_norm(x), and the experts that this chose: where tokens are
    few, the first matrix's kernel chooses."""
    chosen = _chosen(x, router.top_k)
    h, logits = _logits(x, router, mode.dependent)
    return experts(h, chosen, held, way, mode, logits), chosen


def experts(
    x: Tensor,
    chosen: Chosen,
    held: Held,
    way: Way,
    mode: Mode,
    logits: Tensor | None = None,
) -> Tensor:
    """y [split, T * K, rows of down]: every pair's expert in parts to be added; float32 in decode,
    else x's dtype. Rows of pairs elsewhere are not written. logits [T, E] of few tokens: `chosen`
    is written here, by them."""
    x, chosen = x.contiguous(), Chosen(chosen.ids.contiguous(), chosen.weights)
    tokens, top_k = chosen.ids.shape
    pairs, many = tokens * top_k, tokens > DECODE_TOKENS
    mode = Mode(mode.asm, mode.dependent and way.overlap)
    h = x.new_empty(pairs, held.down.columns)
    y = x.new_empty(way.down.split, pairs, held.down.rows, dtype=partial_dtype(tokens, x.dtype))
    if pairs and len(held.gate_up.codes):
        count = len(held.gate_up.codes)
        places = sort(chosen.ids, held.slots, count, mode.dependent) if many else None
        _both(x, h, y, chosen, logits, places, held, way, mode)
    return y


def experts_sorted(x: Tensor, counts: Tensor, held: Held, way: Way, mode: Mode) -> Tensor:
    """y [R, rows of down] of rows that are sorted by expert, counts [e] of each."""
    x, rows = x.contiguous(), x.shape[0]
    mode = Mode(mode.asm, mode.dependent and way.overlap)
    h = x.new_empty(rows, held.down.columns)
    y = x.new_zeros(1, rows, held.down.rows)
    if rows and len(held.gate_up.codes):
        order = torch.arange(rows, dtype=torch.int32, device=x.device)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        chosen = Chosen(order.unsqueeze(1), None)
        _both(x, h, y, chosen, None, (order, starts), held, way, mode)
    return y[0]


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
        num_warps=max(1, min(sizes.warps, max(count, chunk) // 128)), **_options(dependent),
    )  # fmt: skip
    return order, starts


def _both(
    x: Tensor,
    h: Tensor,
    y: Tensor,
    chosen: Chosen,
    logits: Tensor | None,
    places: tuple[Tensor, Tensor] | None,
    held: Held,
    way: Way,
    mode: Mode,
) -> None:
    rest = chosen, logits, places, held, mode
    if h.shape[1]:
        _gemm(x, held.gate_up, held.gate_up_bias, h, True, way.gate_up, *rest)
    _gemm(h, held.down, held.down_bias, y, False, way.down, *rest)


def _gemm(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    out: Tensor,
    gated: bool,
    tile: Tile,
    chosen: Chosen,
    logits: Tensor | None,
    places: tuple[Tensor, Tensor] | None,
    held: Held,
    mode: Mode,
) -> None:
    """One matrix of all pairs; the arguments as in expert_gemm."""
    pairs, top_k, experts = chosen.ids.numel(), chosen.ids.shape[1], len(weight.codes)
    routed = 0 if logits is None else logits.shape[1]
    order, starts = places or (None, None)
    blocks = min(pairs, experts) + (pairs // tile.tokens if places else 0)
    grid = (triton.cdiv(weight.rows, tile.rows) * tile.split, blocks)
    expert_gemm[grid](
        x, _words(weight.codes, torch.int16), _words(weight.scales, torch.int32), bias, out,
        logits, *chosen, held.slots, order, starts, pairs, experts, weight.rows,
        x.stride(0), out.stride(-2), out.stride(0) if out.dim() == 3 else 0, held.alpha, held.limit,
        COLUMNS=weight.columns, BN=tile.rows, BT=tile.tokens, GRANULES=tile.granules,
        SPLIT=tile.split, PARTED=tile.parted, HALVINGS=tile.halvings, GATED=gated,
        SORTED=places is not None, BY_PAIR=pairs < experts, TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k), EXPERTS=triton.next_power_of_2(routed or experts),
        CHOOSE=routed, HAS_SLOTS=held.slots is not None, HAS_BIAS=bias is not None,
        EXACT=weight.exact, ASM=mode.asm, DEPENDENT=mode.dependent,
        EARLY=not gated and weight.columns > 0,  # else nothing came between ids and this
        LATE=tile.late, AHEAD=tile.ahead, num_warps=tile.warps,
        num_stages=tile.stages, **_options(mode.dependent),
    )  # fmt: skip


def reduce(
    y: Tensor,
    chosen: Chosen,
    slots: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    dependent: bool,
) -> tuple[Tensor, Tensor]:
    """out [T, D] and, where there is a norm, its norm (else out again)."""
    chosen = Chosen(chosen.ids.contiguous(), chosen.weights.contiguous())
    out = chosen.weights.new_empty(len(chosen.ids), y.shape[-1])
    h = torch.empty_like(out) if norm is not None else out
    _reduce(y, chosen, slots, residual, norm, out, h, eps, dependent)
    return out, h


def residual_norm(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, dependent: bool
) -> tuple[Tensor, Tensor]:
    like = x if residual is None else residual
    out, h = (like.new_empty(like.shape) for _ in range(2))
    _reduce(x.contiguous()[None], None, None, residual, norm, out, h, eps, dependent)
    return out, h


def _reduce(
    y: Tensor,
    chosen: Chosen | None,
    slots: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    out: Tensor,
    h: Tensor,
    eps: float,
    dependent: bool,
) -> None:
    tokens, width = out.shape
    if not tokens:
        return
    residual = None if residual is None else residual.contiguous()
    ids, weights = chosen or (None, None)
    block = triton.next_power_of_2(width)
    reduce_kernel[(tokens,)](
        y, ids, slots, weights, residual, norm, out, h, y.stride(1), y.stride(0), eps,
        WIDTH=width, BLOCK=block, TOP_K=0 if ids is None else ids.shape[1], SPLIT=y.shape[0],
        HAS_SLOTS=slots is not None, HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm is not None, DEPENDENT=dependent, num_warps=max(1, min(16, block // 256)),
        **_options(dependent),
    )  # fmt: skip


def _words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.view(dtype) if packed.numel() else packed.new_empty(0, dtype=dtype)


def _options(dependent: bool) -> dict[str, bool]:
    """The interpreter takes no launch_pdl, so it is named only where it is used."""
    return {"launch_pdl": True} if dependent else {}
