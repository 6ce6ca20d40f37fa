"""The table of the attention kernels at gpt-oss-20b's shapes, floors measured in the same run.

bench_attention.py [OUT.json]. Times are medians of replays of a CUDA graph that walks over
different weights or caches, more of them than the L2 holds. floor: bytes over the rate of a plain
read. Peer: cuBLAS through torch, torch's flash attention (which has no sinks).
"""

from __future__ import annotations

import json
import sys
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
    read_rate,
    weights,
)
from torch.nn import functional as F
from tpx_attention import (
    linear,
    linear_decode,
    prefill_attention,
    rope_write,
    rope_write_attention,
    sample,
)

DEPTH = 24  # layers that share one lm_head
COUNTS = {"lm_head": 3, "router": 400}  # layers of weights, to be more than the L2 holds


class Table:
    """Rows of what, microseconds, floor, bar (times the floor, or microseconds), peer."""

    def __init__(self, rate: float):
        self.rate = rate
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, us: float, nbytes: float = 0, **more: Any) -> float:
        row = {"what": what, "us": us, "floor": nbytes / self.rate, **more}
        self.rows.append(row)
        shown = f"{what:42} {us:9.2f} us"
        if nbytes:
            shown += f"  floor {row['floor']:8.2f}  {us / row['floor']:5.2f}x"
        print(
            shown,
            *(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items()),
        )
        return us


def linears(table: Table) -> None:
    for rows in (1, 2, 4, 8, 16):
        share = floor = peers = 0.0
        for name in (*LAYERS, *HEAD):
            us, peer, nbytes = one_linear(name, rows)
            table.add(f"{name}, {rows} tokens", us, nbytes, peer=peer)
            part = DEPTH if name in HEAD else 1
            share, peers, floor = share + us / part, peers + peer / part, floor + nbytes / part
        bar = {"bar": 1.25 * floor / table.rate} if rows == 1 else {}
        table.add(f"a layer's share of the four, {rows} tokens", share, floor, peer=peers, **bar)
    us, peer, nbytes = one_linear("qkv", 1, norm=random(2880))
    table.add("norm + qkv, 1 token", us, nbytes, peer=peer)


def one_linear(name: str, rows: int, norm: torch.Tensor | None = None) -> tuple[float, float, int]:
    """(microseconds, the same by torch, bytes of weight)."""
    n, k = {**LAYERS, **HEAD}[name]
    stack, x = weights(n, k, COUNTS.get(name, 12)), random(rows, k)
    bias = None if name in HEAD else random(n)
    residual = random(rows, n) if name == "o_proj" else None
    dtype = torch.float32 if name in ("lm_head", "router") else torch.bfloat16
    terms = (bias, residual, norm, 1e-5, dtype)
    us = graph_us(lambda: [linear_decode(x, w, *terms) for w in stack])
    peer = graph_us(lambda: [linear.by_torch(x, w, *terms) for w in stack])
    return us / len(stack), peer / len(stack), stack[0].nbytes


def decode_us(lengths: list[int], window: int | None, layers: int, early: bool = True) -> float:
    cache = Cache(lengths, layers, window)
    qkv = random(len(lengths), (HEADS + 2 * KV) * WIDTH)
    turn = random(len(lengths), WIDTH // 2), random(len(lengths), WIDTH // 2)

    def launches() -> None:
        for k, v in cache.layers:
            rope_write_attention(qkv, *turn, cache.slots, k, v, *cache.lookup, early)

    return graph_us(launches) / layers


def decodes(table: Table) -> None:
    """rope, cache write and attention of one step."""
    key = 2 * KV * WIDTH * 2
    for early in (True, False):
        word = "" if early else ", after the wait"
        us = decode_us([8192], WINDOW, 320, early)
        table.add(f"window layer, batch 1{word}", us, WINDOW * key, bar=6.0)
        us = decode_us([8192], None, 12, early)
        table.add(f"full layer, batch 1 at 8192{word}", us, 8192 * key, bar=12.0)
    for batch, length, layers in (
        (1, 2048, 40),
        (1, 32768, 4),
        (8, 2048, 6),
        (8, 8192, 2),
        (64, 2048, 2),
    ):
        us = decode_us([length] * batch, None, layers)
        table.add(f"full layer, batch {batch} at {length}", us, batch * length * key)
    us = decode_us([2048] * 64, WINDOW, 8)
    table.add("window layer, batch 64", us, 64 * WINDOW * key)


def block(table: Table) -> None:
    """norm + qkv, attention, o_proj + residual of one token at 2048, 12 layers in a chain."""
    qkv, o_proj = weights(*LAYERS["qkv"], 12), weights(*LAYERS["o_proj"], 12)
    norm, bias, o_bias, h = random(2880), random(5120), random(2880), random(1, 2880)
    caches = [Cache([2048], 1, WINDOW if i % 2 else None) for i in range(12)]
    turn = random(1, WIDTH // 2), random(1, WIDTH // 2)

    def launches() -> None:
        x = h
        for w, o, cache in zip(qkv, o_proj, caches, strict=False):
            rows = linear_decode(x, w, bias, None, norm)
            out = rope_write_attention(
                rows, *turn, cache.slots, *cache.layers[0], *cache.lookup, True
            )
            x = linear_decode(out.view(1, -1), o, o_bias, x)

    nbytes = qkv[0].nbytes + o_proj[0].nbytes + (2048 + WINDOW) // 2 * 2 * KV * WIDTH * 2
    table.add("attention block, 1 token at 2048", graph_us(launches) / 12, nbytes)


def prefills(table: Table) -> None:
    for tokens, past, window in (
        (4096, 0, None),
        (8192, 0, None),
        (2048, 6144, None),
        (4096, 0, WINDOW),
        (8192, 0, WINDOW),
    ):
        us = prefill_us(tokens, past, window)
        seen = tokens * (past + tokens / 2) if window is None else tokens * window
        work = 4 * HEADS * WIDTH * seen / 1e6
        more = {"TFLOP/s": work / us}
        if not past and window is None:
            peer = flash_us(tokens)
            more.update({"peer": peer, "peer TFLOP/s": work / peer})
        table.add(f"prefill {tokens} after {past}, window {window}", us, **more)
    qkv, turn = random(4096, 5120), (random(4096, 32), random(4096, 32))
    cache = Cache([4096], 1)
    slots = torch.arange(4096, device="cuda")
    us = graph_us(lambda: rope_write(qkv, *turn, slots, *cache.layers[0]))
    table.add("rope + cache write, 4096 tokens", us, 4096 * (5120 + 5120) * 2)


def prefill_us(tokens: int, past: int, window: int | None) -> float:
    cache = Cache([past + tokens], 2)
    q = random(tokens, HEADS, WIDTH)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    batch = (starts, cache.lengths, cache.tables, cache.sinks, window)

    def launches() -> None:
        for k, v in cache.layers:
            prefill_attention(q, k, v, *batch)

    return graph_us(launches, 7) / 2


def flash_us(tokens: int) -> float:
    """torch's causal attention with as many key heads as query heads."""
    q, k, v = (random(1, HEADS, tokens, WIDTH) for _ in range(3))
    return graph_us(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 7)


def samples(table: Table) -> None:
    for batch in (1, 8, 64):
        for word, kinds in (
            ("temperature", (False, False)),
            ("top-k", (True, False)),
            ("top-p", (False, True)),
            ("top-k, top-p", (True, True)),
        ):
            table.add(f"sample, batch {batch}, {word}", sample_us(batch, *kinds))


def sample_us(batch: int, any_top_k: bool, any_top_p: bool) -> float:
    logits = random(batch, 201088, dtype=torch.float32)
    temperature, top_p, u = (torch.rand(batch, device="cuda").double() for _ in range(3))
    top_k = torch.full((batch,), 50, device="cuda")
    given = (logits, temperature, top_k, top_p, u, any_top_k, any_top_p)
    return graph_us(lambda: sample(*given))


def main() -> None:
    properties = torch.cuda.get_device_properties(0)
    import triton

    table = Table(read_rate())
    print(
        f"{properties.name}, torch {torch.__version__}, triton {triton.__version__}, "
        f"plain read {table.rate / 1e6:.2f} TB/s"
    )
    for part in (linears, decodes, block, prefills, samples):
        part(table)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(table.rows, file, indent=1)


if __name__ == "__main__":
    main()
