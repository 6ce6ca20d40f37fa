"""The operations as torch.library knows them: kernels on a GPU, the reference elsewhere. Static in
shape and without a wait for the device, so that a CUDA graph can hold them."""

from __future__ import annotations

import torch

from . import configs, device, reference
from .packing import Packed
from .register import fake, operation

if device.has_triton():
    from . import launch, routing

ROUTER = "Tensor? norm, Tensor w, Tensor b, int top_k, float eps"
WEIGHTS = (
    "Tensor gate_up, Tensor gate_up_scales, bool gate_up_exact, Tensor down, Tensor down_scales,"
    " bool down_exact, int units, Tensor? gate_up_bias, Tensor? down_bias, Tensor? slots,"
    " float alpha, float limit, bool safe"
)


def _define(name: str, takes: str, gives: str):
    return operation(name, f"({takes}) -> {gives}")


@_define("route", f"Tensor x, {ROUTER}", "(Tensor, Tensor, Tensor)")
def route(x, norm, w, b, top_k, eps):
    if _runs(x):
        router = routing.Router(norm, w, b, top_k, eps)
        h, chosen = routing.route(x, router, _mode(x))
        ids, weights = chosen.ids, chosen.weights
    else:
        h, ids, weights = reference.route(x, norm, w, b, top_k, eps)
    return x.new_empty(0) if norm is None else h, ids, weights


@fake("route")
def _(x, norm, w, b, top_k, eps):
    ids = x.new_empty(x.shape[0], top_k, dtype=torch.int32)
    h = x.new_empty(0) if norm is None else x.new_empty(x.shape)
    return h, ids, x.new_empty(x.shape[0], top_k)


@_define("experts", f"Tensor x, Tensor ids, {WEIGHTS}", "Tensor")
def experts(x, ids, *weights):
    if not _runs(x):
        return reference.experts(x, ids, *_held(x, *weights))
    chosen = routing.Chosen(ids, None)
    way = _way(x, *ids.shape, _experts_of(*weights))
    return launch.experts(x, chosen, _launched(x, *weights), way, _mode(x, weights[-1]))


@fake("experts")
def _(x, ids, *weights):
    return _parts(x, *ids.shape, _experts_of(*weights))


def _parts(x, tokens: int, top_k: int, experts: int):
    """What `experts` gives, without its numbers."""
    if not _runs(x):
        return x.new_empty(1, tokens * top_k, x.shape[1])
    way = _way(x, tokens, top_k, experts)
    dtype = configs.partial_dtype(way, x.dtype)
    return x.new_empty(way.down.split, tokens * top_k, x.shape[1], dtype=dtype)


@_define("route_experts", f"Tensor x, {ROUTER}, {WEIGHTS}", "(Tensor, Tensor, Tensor)")
def route_experts(x, norm, w, b, top_k, eps, *weights):
    way = _way(x, x.shape[0], top_k, w.shape[0]) if _runs(x) else None
    if way and not way.sorted and weights[0].numel() and _units_of(*weights):
        router = routing.Router(norm, w, b, top_k, eps)
        held, mode = _launched(x, *weights), _mode(x, weights[-1])
        y, (ids, shares) = launch.route_experts(x, router, held, way, mode)
        return y, ids, shares
    h, ids, shares = route(x, norm, w, b, top_k, eps)
    return experts(x if norm is None else h, ids, *weights), ids, shares


@fake("route_experts")
def _(x, norm, w, b, top_k, eps, *weights):
    tokens = x.shape[0]
    ids = x.new_empty(tokens, top_k, dtype=torch.int32)
    return _parts(x, tokens, top_k, w.shape[0]), ids, x.new_empty(tokens, top_k)


@_define("experts_sorted", f"Tensor x, Tensor counts, {WEIGHTS}", "Tensor")
def experts_sorted(x, counts, *weights):
    if not _runs(x):
        return reference.experts_sorted(x, counts, *_held(x, *weights))
    rows = max(x.shape[0], _table(x).few + 1)
    way = _way(x, rows, 1, len(weights[0]))
    held = _launched(x, *weights)
    return launch.experts_sorted(x, counts, held, way, _mode(x, weights[-1]))


@fake("experts_sorted")
def _(x, counts, *weights):
    return x.new_empty(x.shape)


@_define(
    "reduce",
    "Tensor y, Tensor ids, Tensor weights, Tensor? slots, Tensor? residual, Tensor? norm,"
    " float eps",
    "(Tensor, Tensor)",
)
def reduce(y, ids, weights, slots, residual, norm, eps):
    if _runs(y):
        chosen = routing.Chosen(ids, weights)
        dependent = _mode(y).dependent
        out, h = launch.reduce(y, chosen, slots, residual, norm, eps, dependent)
    else:
        out, h = reference.reduce(y, ids, weights, slots, residual, norm, eps)
    return out, out.new_empty(0) if norm is None else h


@fake("reduce")
def _(y, ids, weights, slots, residual, norm, eps):
    out = weights.new_empty(weights.shape[0], y.shape[-1])
    return out, out.new_empty(0) if norm is None else torch.empty_like(out)


@_define("residual_norm", "Tensor x, Tensor? residual, Tensor norm, float eps", "(Tensor, Tensor)")
def residual_norm(x, residual, norm, eps):
    if _runs(x):
        return launch.residual_norm(x, residual, norm, eps, _mode(x).dependent)
    return reference.residual_norm(x, residual, norm, eps)


@fake("residual_norm")
def _(x, residual, norm, eps):
    like = x if residual is None else residual
    return like.new_empty(like.shape), like.new_empty(like.shape)


def _runs(x) -> bool:
    return device.available(x.device, x.dtype)


def _mode(x, safe: bool = False) -> device.Mode:
    mode = device.mode(x.device, x.dtype)
    return mode._replace(asm=mode.asm and not safe)


def _way(x, tokens: int, top_k: int, experts: int) -> configs.Way:
    return _table(x).way(tokens, top_k, experts, x.element_size())


def _table(x) -> configs.Table:
    return configs.table(device.names(x.device), x.shape[1])


def _experts_of(gate_up, *rest) -> int:
    """How many the router chooses from."""
    slots = rest[8]
    return len(gate_up) if slots is None else len(slots)


def _units_of(gate_up, gate_up_scales, exact, down, down_scales, down_exact, units, *rest) -> int:
    return units


def _held(
    x, gate_up, gate_up_scales, gate_up_exact, down, down_scales, down_exact, units,
    gate_up_bias, down_bias, slots, alpha, limit, safe,
):  # fmt: skip
    up = Packed(gate_up, gate_up_scales, 2 * units, x.shape[1], True, gate_up_exact)
    to = Packed(down, down_scales, x.shape[1], units, False, down_exact)
    return up, to, gate_up_bias, down_bias, slots, alpha, limit


def _launched(x, *weights):
    return launch.Held(*_held(x, *weights))
