"""Times block sizes on the device at hand: tune_attention.py OUT.json [--warm I/N].

--warm compiles the I-th of N parts into triton's cache and times nothing, so that N processes
share that work. Every variant is compared with float32 before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from typing import Any

import torch
from attention_timing import (
    HEAD,
    HEADS,
    KV,
    LAYERS,
    WIDTH,
    WINDOW,
    Cache,
    graph_us,
    random,
    weights,
)
from tpx_attention import attention, linear, reference


def linear_configs(rows: int):
    if rows <= 4:
        for n, k, warps in itertools.product((1, 2, 4, 8), (512, 1024), (2, 4, 8)):
            if 16 <= n * 3072 // (32 * warps) <= 128 and k >= 256 * warps // 4:
                yield {"kernel": "gemv", "block_n": n, "block_k": k, "warps": warps}
    if rows >= 4:
        for (n, warps), k, splits in itertools.product(
            ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4)), (64, 128, 256), (1, 2, 3, 4, 8)
        ):
            if n * k <= 8192:
                stages = 5 if n * k <= 4096 else 3
                sizes = {"block_n": n, "block_k": k, "splits": splits, "warps": warps}
                yield {"kernel": "skinny", **sizes, "stages": stages}


def linear_cases():
    for name, (n, k) in {**LAYERS, **HEAD, "qkv+norm": LAYERS["qkv"]}.items():
        for rows in (1, 2, 4, 8, 16):
            for config in linear_configs(rows):
                if name == "lm_head" and config.get("splits", 1) > 1:
                    continue
                yield name, n, k, rows, config


def attention_cases():
    """(phase, sequences, sizes)"""
    blocks = ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8))
    decodes = (("window", 1, (1,)), ("window", 64, (1,)), ("full", 1, (16, 32, 64)))
    for kind, rows, splits in (*decodes, ("full", 8, (2, 4, 8, 16)), ("full", 64, (1, 2, 4))):
        for (block, warps), s in itertools.product(blocks, splits):
            for combine in (1, 4) if s > 1 else (1,):
                sizes = {"block": block, "warps": warps, "splits": s, "combine_warps": combine}
                yield f"decode_{kind}", rows, sizes
    for kind in ("window", "full"):
        for m, n, warps, stages in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3)):
            if (m == 64 and warps == 8) or (m == 256 and (warps == 4 or n == 128)):
                continue
            sizes = {"block_m": m, "block_n": n, "warps": warps, "stages": stages}
            yield f"prefill_{kind}", 1, sizes


class Linears:
    """Inputs of one shape, and float32 results to compare with."""

    def __init__(self, name: str, n: int, k: int, layers: int):
        self.name, self.weights = name, weights(n, k, layers)
        self.bias = None if name == "lm_head" else random(n)
        self.dtype = torch.float32 if name in ("lm_head", "router") else torch.bfloat16
        self.x = random(16, k)
        self.residual = random(16, n) if name == "o_proj" else None
        self.norm = random(k) if name == "qkv+norm" else None

    def terms(self, rows: int):
        residual = None if self.residual is None else self.residual[:rows]
        return self.bias, residual, self.norm, 1e-5, self.dtype

    def run(self, rows: int, config: dict[str, Any] | None) -> torch.Tensor:
        for weight in self.weights:
            if config is None:
                out = linear.by_torch(self.x[:rows], weight, *self.terms(rows))
            else:
                out = linear.launch(self.x[:rows], weight, *self.terms(rows), config=config)
        return out

    def wrong(self, rows: int, config: dict[str, Any]) -> float:
        bias, residual, *rest = self.terms(rows)
        expected = reference.linear_decode(
            self.x[:rows], self.weights[-1], bias, residual, *rest[:2], torch.float32
        )
        return float((self.run(rows, config) - expected).norm() / expected.norm())


class Attends:
    """Decode at 8192 positions (2048 of several sequences), prefill of 4096 tokens."""

    def __init__(self, phase: str, rows: int, layers: int):
        self.phase = phase
        self.window = WINDOW if phase.endswith("window") else None
        decode = phase.startswith("decode")
        length = 4096 if not decode else 8192 if rows == 1 else 2048
        self.cache = Cache([length] * rows, layers, self.window if decode else None)
        self.qkv = random(rows, (HEADS + 2 * KV) * WIDTH)
        self.angles = random(rows, WIDTH // 2), random(rows, WIDTH // 2)
        self.q = random(rows if decode else 4096, HEADS, WIDTH)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        if not decode:
            self.starts *= 4096

    def run(self, config: dict[str, Any], early: bool = True) -> torch.Tensor:
        cache = self.cache
        for k, v in cache.layers:
            if self.phase.startswith("decode"):
                config = {"programs": 1 << 20, **config}
                new = (*self.angles, cache.slots)
                out = attention.launch_decode(self.qkv, new, k, v, cache.lookup, early, config)
            else:
                batch = (self.starts, cache.lengths, cache.tables)
                out = attention.launch_prefill(
                    self.q, k, v, batch, cache.sinks, self.window, config
                )
        return out

    def expected(self) -> torch.Tensor:
        k, v = self.cache.layers[-1]
        q = self.q
        if self.phase.startswith("decode"):
            q = reference.rope_write(self.qkv, *self.angles, self.cache.slots, k, v)
        batch = (self.starts, self.cache.lengths, self.cache.tables)
        return reference.attention(q, k, v, *batch, self.cache.sinks, self.window).float()


def linears(part, warm: bool, found: list[dict[str, Any]], only: tuple[str, ...]) -> None:
    inputs: dict[str, Linears] = {}
    for i, (name, n, k, rows, config) in enumerate(linear_cases()):
        if i % part[1] != part[0] or not name.startswith(only):
            continue
        if name not in inputs:
            inputs.clear()
            layers = 1 if warm else 3 if name == "lm_head" else 400 if name == "router" else 12
            inputs[name] = Linears(name, n, k, layers)
        case = inputs[name]
        run = functools.partial(case.run, rows)
        if warm:
            run(config)
            continue
        variants = [(config, case.wrong(rows, config))]
        if config == next(linear_configs(rows)):
            variants.append((None, 0.0))
        for variant, wrong in variants:
            us = graph_us(functools.partial(run, variant), 7) / len(case.weights)
            entry = {"name": name, "rows": rows, "us": us, "error": wrong}
            found.append({**entry, "config": variant or {"kernel": "torch"}})


def attentions(part, warm: bool, found: list[dict[str, Any]], only: tuple[str, ...]) -> None:
    inputs: dict[tuple[str, int], tuple[Attends, torch.Tensor]] = {}
    counts = {("decode_window", 1): 320, ("decode_full", 1): 12, ("decode_window", 64): 8}
    for i, (phase, rows, config) in enumerate(attention_cases()):
        if i % part[1] != part[0] or not phase.startswith(only):
            continue
        if (phase, rows) not in inputs:
            inputs.clear()
            case = Attends(phase, rows, 1 if warm else counts.get((phase, rows), 4))
            inputs[phase, rows] = case, case.q if warm else case.expected()
        case, expected = inputs[phase, rows]
        got = case.run(config)
        if warm:
            continue
        wrong = float((got - expected).norm() / expected.norm())
        us = graph_us(functools.partial(case.run, config), 7) / len(case.cache.layers)
        found.append({"name": phase, "rows": rows, "us": us, "error": wrong, "config": config})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--warm")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    given = parser.parse_args()
    part = tuple(int(x) for x in (given.warm or "0/1").split("/"))
    found: list[dict[str, Any]] = []
    only = tuple(given.only.split(","))
    attentions(part, bool(given.warm), found, only)
    linears(part, bool(given.warm), found, only)
    if given.warm:
        return
    with open(given.out, "w") as file:
        json.dump(found, file)
    key = lambda e: (e["name"], e["rows"])  # noqa: E731
    for (name, rows), group in itertools.groupby(
        sorted(found, key=lambda e: (*key(e), e["us"])), key
    ):
        every = list(group)
        for e in every[:4] + [e for e in every[4:] if e["config"].get("kernel") == "torch"]:
            print(f"{name:15} {rows:3} {e['us']:9.2f} us  {e['config']}")
        worst = max(every, key=lambda e: e["error"])
        print(f"{'':15}     worst error {worst['error']:.2e} of {len(every)}: {worst['config']}")


if __name__ == "__main__":
    main()
