"""Finds the tiles of a device's table: times a layer with each tile of a list, writes the best.

    PYTHONPATH=kernels/tpx-moe/torch-ext python kernels/tpx-moe/benchmarks/tune_moe.py --out FILE \
        [--tokens 1 2 4 8 16 ...] [--few 16]

For each number of tokens it begins with the table in use, and tries the tiles of gate_up, then
those of down with the best of gate_up. Kernels are compiled first, in as many processes as there
are cores; what fails to compile, or is far from the table's numbers, is left out. FILE belongs into
torch-ext/tpx_moe/configs/, named after the device: NVIDIA_H100_80GB_HBM3.json, for instance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import bench_moe
import torch
from bench_moe import EXPERTS, HIDDEN, TOP_K
from tpx_moe import configs, device, launch, routing
from tpx_moe.configs import Tile, Way
from tpx_moe.selftest import FAR

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
FEW = 16  # tokens that are not sorted
LAST = 1e6  # pairs an expert of the last entry


def tiles(tokens: int, few: int, gated: bool) -> Iterator[Tile]:
    """To be tried for so many tokens, of gate_up or of down."""
    if tokens <= few:
        wide = 8 if tokens <= 8 else 16
        steps = (2, 4), (3, 2), (4, 2), (5, 2), (6, 2), (3, 4), (4, 4)
        splits, ahead = ((1,), (0,)) if gated else ((1, 2), (0, 4, 8))
        for (rows, warps), (stages, granules), split, late, early in itertools.product(
            ((16, 1), (32, 2), (64, 2), (64, 4)), steps, splits, (False, True), ahead
        ):
            yield Tile(rows, wide, warps, stages, granules, split, False, 0, late, early)
        return
    load = tokens * TOP_K / EXPERTS
    shapes = (64, 16, 4, 4), (128, 16, 4, 4), (128, 32, 4, 3), (128, 64, 4, 4), (128, 128, 4, 3)
    for rows, columns, warps, stages in (*shapes, (128, 256, 8, 3)):
        if load / 4 <= columns <= max(8 * load, 16):
            for halvings in range(min(int(math.log2(columns // 16)), 3) + 1):
                yield Tile(rows, columns, warps, stages, 2, 1, False, halvings)


def best(start: Way, choices: dict[str, Iterable[Tile]], cost: Callable[[Way], float]) -> Way:
    """The way of the least cost that differs from `start` in gate_up, then in down."""
    found, least = start, cost(start)
    for matrix, tried in choices.items():
        for way in [found._replace(**{matrix: tile}) for tile in tried]:
            if (spent := cost(way)) < least:
                found, least = way, spent
    return found


def entries(ways: dict[int, Way]) -> dict[str, list[dict[str, Any]]]:
    """As configs.parse takes them. ways: by tokens."""
    table: dict[str, list[dict[str, Any]]] = {"decode": [], "sorted": []}
    for tokens, way in sorted(ways.items()):
        entry = {"upto": tokens, "overlap": way.overlap}
        entry |= {matrix: getattr(way, matrix)._asdict() for matrix in ("gate_up", "down")}
        if way.sorted:
            entry["upto"] = tokens * TOP_K / EXPERTS
        table["sorted" if way.sorted else "decode"].append(entry)
    if table["sorted"]:
        table["sorted"][-1]["upto"] = LAST
    return table


class Bench:
    """Layers of random weights on the device at hand."""

    def __init__(self, layers: int, tokens: int):
        torch.manual_seed(0)
        self.mode = device.mode(torch.device("cuda"), torch.bfloat16)
        made = [bench_moe.random_layer() for _ in range(layers)]
        self.routers = [routing.Router(r.norm_D, r.w_ED, r.b_E, r.top_k, r.eps) for r, _ in made]
        self.held = [launch.Held(*h[:4], h.slot_E, h.alpha, h.limit) for _, h in made]
        self.inputs = [torch.randn(tokens, HIDDEN, device="cuda").bfloat16() for _ in made]
        self.expected: torch.Tensor | None = None

    def layer(self, number: int, way: Way) -> torch.Tensor:
        x, router, held = self.inputs[number], self.routers[number], self.held[number]
        if way.sorted:
            h, chosen = routing.route(x, router, self.mode)
            y = launch.experts(h, chosen, held, way, self.mode)
        else:
            y, chosen = launch.route_experts(x, router, held, way, self.mode)
        dependent = self.mode.dependent
        return launch.reduce(y, chosen, None, x, router.norm, router.eps, dependent)[0]

    def is_right(self, way: Way) -> bool:
        """Whether it runs, and its numbers are near those of the first way."""
        try:
            out = self.layer(0, way).float()
        except Exception as error:  # of the compiler: any kind
            print(f"  {error!r:.90}")
            return False
        self.expected = out if self.expected is None else self.expected
        return bool((out - self.expected).norm() <= FAR * self.expected.norm())

    def microseconds(self, way: Way) -> float:
        """Of a layer; infinity where the way is not right."""
        if not self.is_right(way):
            return math.inf
        return bench_moe.microseconds(lambda: [self.layer(n, way) for n in range(len(self.held))])


def start(tokens: int, few: int) -> Way:
    """Of the table in use; where that sorts and this does not, or the reverse, the nearest."""
    table = configs.table(device.names(torch.device("cuda")), HIDDEN)
    way = table.way(tokens, TOP_K, EXPERTS)
    if way.sorted and tokens <= few:
        wide = [t._replace(tokens=16, halvings=0) for t in (way.gate_up, way.down)]
        return Way(False, tokens, True, *wide)
    return table.sorted[0] if tokens > few and not way.sorted else way


def compile_all(jobs: tuple[int, list[Way]]) -> None:
    tokens, ways = jobs
    bench = Bench(1, tokens)
    for way in ways:
        bench.is_right(way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the table, as JSON")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--few", type=int, default=FEW, help="up to so many are not sorted")
    arguments = parser.parse_args()
    few, ways = arguments.few, {}
    pool = multiprocessing.get_context("spawn").Pool(os.cpu_count())
    for tokens in arguments.tokens:
        first = start(tokens, few)
        choices = {m: [*tiles(tokens, few, m == "gate_up")] for m in ("gate_up", "down")}
        every = [first._replace(**{m: tile}) for m, tried in choices.items() for tile in tried]
        shares = [every[n :: os.cpu_count()] for n in range(os.cpu_count() or 1)]
        pool.map(compile_all, [(tokens, share) for share in shares if share])
        bench = Bench(bench_moe.LAYERS, tokens)
        before = bench.microseconds(first)
        ways[tokens] = best(first, choices, bench.microseconds)
        after = bench.microseconds(ways[tokens])
        print(
            f"{tokens} tokens: {before:.1f} us before, {after:.1f} now: {ways[tokens]}", flush=True
        )
        arguments.out.write_text(json.dumps({"any": entries(ways)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
