"""Launches the experts' kernels on given tensors: shapes, grids, buffers. Needs triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .configs import Tile, Way, partial_dtype
from .device import Mode
from .gemm_kernels import expert_gemm
from .packing import Packed
from .reduce_kernels import reduce_kernel
from .routing import Chosen, Router, not_chosen, options, router_logits, sort


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


def route_experts(
    x: Tensor, router: Router, held: Held, way: Way, mode: Mode
) -> tuple[Tensor, Chosen]:
    """y as `experts` gives it for rms_norm(x), and the experts that this chose: where tokens are
    few, the first matrix's kernel chooses."""
    chosen = not_chosen(x, router.top_k)
    h, logits = router_logits(x, router, mode.dependent)
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
    pairs = tokens * top_k
    mode = Mode(mode.asm, mode.dependent and way.overlap)
    h = x.new_empty(pairs, held.down.columns)
    y = x.new_empty(way.down.split, pairs, held.down.rows, dtype=partial_dtype(way, x.dtype))
    if pairs and len(held.gate_up.codes):
        count = len(held.gate_up.codes)
        places = sort(chosen.ids, held.slots, count, mode.dependent) if way.sorted else None
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
    by_pair = pairs < experts
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
        SORTED=places is not None, BY_PAIR=by_pair, TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k), EXPERTS=triton.next_power_of_2(routed or experts),
        CHOOSE=routed, ALONE=by_pair and pairs == top_k, HAS_SLOTS=held.slots is not None,
        HAS_BIAS=bias is not None, EXACT=weight.exact, ASM=mode.asm, DEPENDENT=mode.dependent,
        EARLY=not gated and weight.columns > 0,  # else nothing came between ids and this
        LATE=tile.late, AHEAD=tile.ahead, num_warps=tile.warps,
        num_stages=tile.stages, **options(mode.dependent),
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
        **options(dependent),
    )  # fmt: skip


def _words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.view(dtype) if packed.numel() else packed.new_empty(0, dtype=dtype)
