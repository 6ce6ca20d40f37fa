"""Compares what will run on a device with the reference, once after loading.

The compiler has known faults with asynchronous matrix instructions, so each configuration shows
what it computes before it is trusted. Dense layers are tried as models call them, with bias and
residual and without a norm, which would double what is compiled; the tests on a GPU have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import attention, linear, reference
from .sample import sample

ROWS = (1, 2, 3, 4, 8, 16)
BOUND = 1e-2  # |got - expected| / |expected| of bfloat16 or float16 results; NaN is never below


def self_test(
    device: torch.device,
    linears: tuple[tuple[int, int], ...] = (),
    heads: int = 64,
    kv: int = 8,
    width: int = 64,
    page: int = 16,
    window: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    judge: bool = True,
) -> dict[str, float]:
    """{operation: its largest error on random numbers}; an operation above BOUND is wrong there.

    linears: (outputs, inputs) of the layers that will run, each with 1 to 16 rows. judge: False
    only launches, and gives {}, for one who wants to know what is launched.
    """
    jobs: list[Callable[..., dict[str, float]]] = [
        functools.partial(_attention, heads=heads, kv=kv, width=width, page=page, window=kind)
        for kind in (None, window)
    ]
    jobs.append(_sample)
    for n, k in linears:
        weight_NK = _random(device, dtype, 1)(n, k)
        jobs += [functools.partial(_linear, weight_NK=weight_NK, rows=rows) for rows in ROWS]
    errors: dict[str, float] = {}
    with ThreadPoolExecutor(initializer=_use, initargs=(device,)) as pool:
        found = pool.map(lambda job: job(_random(device, dtype), judge=judge), jobs)
        for name, wrong in (pair for each in found for pair in each.items()):
            errors[name] = max(errors.get(name, 0.0), wrong, key=_nan_last)
    return errors


def _use(device: torch.device) -> None:
    """A thread begins on the first device, whichever its process has chosen."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _random(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """Normal numbers of a shape, the same ones in every run."""
    make = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=make, device=device).to(dtype)


def _nan_last(x: float) -> float:
    return float("inf") if x != x else x


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def _linear(random, weight_NK: Tensor, rows: int, judge: bool) -> dict[str, float]:
    n, k = weight_NK.shape
    terms = (random(n), random(rows, n))
    x_TK = random(rows, k)
    got = linear.linear_decode(x_TK, weight_NK, *terms)
    if not judge:
        return {}
    wrong = _error(got, reference.linear_decode(x_TK, weight_NK, *terms))
    return {f"linear_decode {n}x{k}": wrong}


def _attention(
    random, heads: int, kv: int, width: int, page: int, window: int | None, judge: bool
) -> dict[str, float]:
    """Two sequences, of 700 and 1 positions, in pages that run backwards."""
    lengths = [700, 1]
    pages = -(-700 // page)
    sinks_H = random(heads)
    where = {"device": sinks_H.device}
    tables_BN = torch.arange(2 * pages - 1, -1, -1, dtype=torch.int32, **where).view(2, pages)
    lengths_B = torch.tensor(lengths, dtype=torch.int32, **where)
    cache = tuple(random(2 * pages, page, kv, width) for _ in "kv")
    angles = (random(2, width // 2), random(2, width // 2))
    slots = tables_BN[range(2), [(n - 1) // page for n in lengths]] * page + (lengths_B - 1) % page
    qkv_BX = random(2, (heads + 2 * kv) * width)
    mine, theirs = ([x.clone() for x in cache] for _ in range(2))
    lookup = (tables_BN, lengths_B, sinks_H, window)
    got = attention.rope_write_attention(qkv_BX, *angles, slots.long(), *mine, *lookup)
    q_BHD = reference.rope_write(qkv_BX, *angles, slots.long(), *theirs)
    alone = attention.decode_attention(q_BHD, *theirs, *lookup)
    q_THD = random(331, heads, width)
    starts_B = torch.tensor([0, 330, 331], dtype=torch.int32, **where)
    batch = (starts_B, lengths_B, tables_BN, sinks_H, window)
    filled = attention.prefill_attention(q_THD, *cache, *batch)
    if not judge:
        return {}
    want = reference.decode_attention(q_BHD, *theirs, *lookup)
    written = max(_error(a, b) for a, b in zip(mine, theirs))  # noqa: B905  (Python 3.9)
    return {
        "rope_write_attention": max(_error(got, want), written, key=_nan_last),
        "decode_attention": _error(alone, want),
        "prefill_attention": _error(filled, reference.attention(q_THD, *cache, *batch)),
    }


def _sample(random, judge: bool) -> dict[str, float]:
    """The share of draws that differ."""
    logits_BV = random(6, 5000).float() * 3
    where = {"device": logits_BV.device, "dtype": torch.float64}
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.0, 1.2, 1.0], **where)
    top_k = torch.tensor([0, 0, 50, 0, 1000, 1], device=logits_BV.device)
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.95, 0.5], **where)
    given = (logits_BV, temperature, top_k, top_p, torch.linspace(0.05, 0.95, 6, **where))
    got = sample(*given)
    if not judge:
        return {}
    return {"sample": float((got != reference.sample(*given)).double().mean())}
