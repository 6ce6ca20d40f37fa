"""Attention over a paged cache and the step that fills it. Shapes as in reference.py."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import configs, reference
from .device import available, dependent, launch_options, plain
from .register import fake, operation

CACHE = "Tensor(a!) k_cache, Tensor(b!) v_cache"
LOOKUP = "Tensor tables_BN, Tensor lengths_B, Tensor sinks_H, int? window"


def _scale(width: int) -> float:
    """Of scores, in units of log2."""
    return width**-0.5 * 1.4426950408889634


def _padded(group: int) -> int:
    """Rows of a matrix product: a power of two, at least 16."""
    return max(16, 1 << (group - 1).bit_length())


@functools.cache
def _config(device: torch.device, phase: str, window: int | None, rows: int) -> dict[str, Any]:
    kind = "full" if window is None else "window"
    return configs.attention(torch.cuda.get_device_name(device), f"{phase}_{kind}", rows)


@operation(
    "rope_write", f"(Tensor qkv_TX, Tensor cos, Tensor sin, Tensor slots_T, {CACHE}) -> Tensor"
)
def rope_write(
    qkv_TX: Tensor, cos: Tensor, sin: Tensor, slots_T: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """q_THD, turned; writes turned k, and v, to slots_T. See reference.rope_write."""
    if not available(qkv_TX.device):
        return reference.rope_write(qkv_TX, cos, sin, slots_T, k_cache, v_cache)
    return launch_rope_write(qkv_TX, cos, sin, slots_T, k_cache, v_cache)


@fake("rope_write")
def _(qkv_TX, cos, sin, slots_T, k_cache, v_cache):
    kv, width = k_cache.shape[2:]
    return qkv_TX.new_empty((qkv_TX.shape[0], qkv_TX.shape[1] // width - 2 * kv, width))


ROPE = {"tokens": 2, "heads": 8, "warps": 4}  # tokens and key heads of a program


def launch_rope_write(qkv_TX, cos, sin, slots_T, k_cache, v_cache, config=ROPE) -> Tensor:
    from .prefill_kernels import rope_write as kernel

    kv, width = k_cache.shape[2:]
    assert all(x.is_contiguous() for x in (qkv_TX, cos, sin, k_cache, v_cache))
    tokens, heads = qkv_TX.shape[0], qkv_TX.shape[1] // width - 2 * kv
    out_THD = qkv_TX.new_empty((tokens, heads, width))
    each = math.gcd(kv, config["heads"])
    queries = each * (heads // kv)
    if out_THD.numel():
        kernel[(-(-tokens // config["tokens"]), kv // each)](
            qkv_TX, cos, sin, slots_T, k_cache, v_cache, out_THD, tokens,
            KV=kv, GROUP=heads // kv, D=width, TOKENS=config["tokens"], EACH=each,
            HEADS=1 << (queries - 1).bit_length(), DEPENDENT=dependent(qkv_TX.device),
            **launch_options(qkv_TX.device, config["warps"]),
        )  # fmt: skip
    return out_THD


@operation(
    "decode_attention",
    f"(Tensor q_BHD, Tensor k_cache, Tensor v_cache, {LOOKUP}, bool early=False) -> Tensor",
)
def decode_attention(
    q_BHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    sinks_H: Tensor,
    window: int | None,
    early: bool = False,
) -> Tensor:
    """o_BHD of one token a sequence, whose key and value the cache holds already.

    The launch has one shape for all lengths up to N * page. early: tables, lengths and older
    entries of the cache were complete before any launch that may still run, as in a captured step,
    so they are read without waiting for the launch ahead of this one.
    """
    if not available(q_BHD.device):
        return reference.decode_attention(
            q_BHD, k_cache, v_cache, tables_BN, lengths_B, sinks_H, window
        )
    config = _config(q_BHD.device, "decode", window, len(q_BHD))
    lookup = (tables_BN, lengths_B, sinks_H, window)
    return launch_decode(q_BHD, None, k_cache, v_cache, lookup, early, config)


@fake("decode_attention")
def _(q_BHD, k_cache, v_cache, tables_BN, lengths_B, sinks_H, window, early=False):
    return torch.empty_like(q_BHD)


@operation(
    "rope_write_attention",
    f"(Tensor qkv_BX, Tensor cos, Tensor sin, Tensor slots_B, {CACHE}, {LOOKUP}, "
    "bool early=False) -> Tensor",
)
def rope_write_attention(
    qkv_BX: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_B: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    sinks_H: Tensor,
    window: int | None,
    early: bool = False,
) -> Tensor:
    """rope_write, then decode_attention, in one launch (two where keys are cut over programs).

    lengths_B counts the new token; a sequence of length 0 is a row without one.
    """
    if not available(qkv_BX.device):
        q_BHD = reference.rope_write(
            qkv_BX, cos, sin, slots_B.masked_fill(lengths_B == 0, -1), k_cache, v_cache
        )
        return reference.decode_attention(
            q_BHD, k_cache, v_cache, tables_BN, lengths_B, sinks_H, window
        )
    config = _config(qkv_BX.device, "decode", window, len(qkv_BX))
    lookup = (tables_BN, lengths_B, sinks_H, window)
    new = (cos, sin, slots_B)
    return launch_decode(qkv_BX, new, k_cache, v_cache, lookup, early, config)


@fake("rope_write_attention")
def _(qkv_BX, cos, sin, slots_B, k_cache, v_cache, *_):
    kv, width = k_cache.shape[2:]
    return qkv_BX.new_empty((qkv_BX.shape[0], qkv_BX.shape[1] // width - 2 * kv, width))


def splits_for(rows: int, kv: int, longest: int, config: dict[str, Any]) -> int:
    """Runs of keys a sequence: enough programs for the device, none shorter than one block."""
    wanted = max(1, config["programs"] // (rows * kv))
    return min(wanted, config["splits"], -(-longest // config["block"]))


def launch_decode(
    q: Tensor,
    new: tuple[Tensor, Tensor, Tensor] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lookup: tuple[Tensor, Tensor, Tensor, int | None],
    early: bool,
    config: dict[str, Any],
) -> Tensor:
    """new: cos, sin and slots; q then holds rows of q, k and v."""
    from .decode_kernels import combine, decode

    tables, lengths, sinks, window = lookup
    page, kv, width = k_cache.shape[1:]
    rows, heads = len(q), len(sinks)
    assert all(x.is_contiguous() for x in (q, k_cache, v_cache, tables))
    assert heads % kv == 0, f"{heads=} {kv=}"
    out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    flat, stride = q.view(-1), q.stride(0)
    cos, sin, slots = new or (q, q, q)
    splits = splits_for(rows, kv, window or tables.shape[1] * page, config)
    part, lse = out, out
    if splits > 1:
        part = torch.empty((rows, heads, splits, width), dtype=torch.float32, device=q.device)
        lse = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
    decode[(rows, kv, splits)](
        q, flat[heads * width :], flat[(heads + kv) * width :], stride, cos, sin, slots,
        k_cache, v_cache, tables, lengths, sinks, out, part, lse, tables.shape[1], _scale(width),
        KV=kv, GROUP=heads // kv, HEADS=_padded(heads // kv), D=width, PAGE=page,
        WINDOW=window or 0, BLOCK=config["block"], SPLITS=splits, NEW=new is not None,
        EARLY=early, PLAIN=plain(q.device), DEPENDENT=dependent(q.device),
        **launch_options(q.device, config["warps"]),
    )  # fmt: skip
    if splits > 1:
        combine[(rows * heads,)](
            part, lse, sinks, out, heads, D=width, SPLITS=splits,
            BLOCK=1 << (splits - 1).bit_length(), DEPENDENT=dependent(q.device),
            **launch_options(q.device, config["combine_warps"]),
        )  # fmt: skip
    return out


@operation(
    "prefill_attention",
    "(Tensor q_THD, Tensor k_cache, Tensor v_cache, Tensor starts_B, Tensor lengths_B, "
    "Tensor tables_BN, Tensor sinks_H, int? window) -> Tensor",
)
def prefill_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    tables_BN: Tensor,
    sinks_H: Tensor,
    window: int | None,
) -> Tensor:
    """o_THD of any batch (prefill, chunks after a cached prefix, decode, a mixture), whose keys
    and values the cache holds already. See reference.attention."""
    if not available(q_THD.device):
        return reference.attention(
            q_THD, k_cache, v_cache, starts_B, lengths_B, tables_BN, sinks_H, window
        )
    config = _config(q_THD.device, "prefill", window, len(q_THD))
    batch = (starts_B, lengths_B, tables_BN)
    return launch_prefill(q_THD, k_cache, v_cache, batch, sinks_H, window, config)


@fake("prefill_attention")
def _(q_THD, k_cache, v_cache, starts_B, lengths_B, tables_BN, sinks_H, window):
    return torch.empty_like(q_THD)


def steps_to_find(sequences: int) -> int:
    """Halvings of so many or more: few different numbers, each of which is a kernel to compile."""
    least = sequences.bit_length()
    return next((steps for steps in (1, 4, 9) if steps >= least), least)


def launch_prefill(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: tuple[Tensor, Tensor, Tensor],
    sinks_H: Tensor,
    window: int | None,
    config: dict[str, Any],
) -> Tensor:
    from .prefill_kernels import prefill

    starts, lengths, tables = batch
    page, kv, width = k_cache.shape[1:]
    tokens, heads = q_THD.shape[:2]
    assert all(x.is_contiguous() for x in (q_THD, k_cache, v_cache, tables))
    assert heads % kv == 0, f"{heads=} {kv=}"
    group = heads // kv
    block_m = max(config["block_m"], _padded(group))
    block_q = block_m // group
    out_THD = torch.empty_like(q_THD)
    if tokens:
        prefill[(kv, tokens // block_q + len(lengths))](
            q_THD, k_cache, v_cache, starts, lengths, tables, sinks_H, out_THD,
            len(lengths), tables.shape[1], _scale(width),
            KV=kv, GROUP=group, D=width, PAGE=page, WINDOW=window or 0, BLOCK_Q=block_q,
            BLOCK_M=block_m, BLOCK_N=config["block_n"], SEARCH=steps_to_find(len(lengths)),
            PLAIN=plain(q_THD.device), DEPENDENT=dependent(q_THD.device),
            **launch_options(q_THD.device, config["warps"], config["stages"]),
        )  # fmt: skip
    return out_THD
