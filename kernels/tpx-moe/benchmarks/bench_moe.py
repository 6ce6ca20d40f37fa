"""What a Mixture-of-Experts layer costs beside what its bytes or its products must cost.

    PYTHONPATH=kernels/tpx-moe/torch-ext python kernels/tpx-moe/benchmarks/bench_moe.py [--out FILE]

One CUDA graph walks over 8 layers with different weights, routers and tokens: norm, router, top-k,
both matrices of the experts, sum, residual and the next norm. `floor` is the bytes of the experts
that the run's own routing touches over the rate of a plain read, measured here too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from tpx_moe import (
    Experts,
    Packed,
    Router,
    experts,
    packed_nbytes,
    reduce_residual_norm,
    route,
    route_experts,
    self_test,
)

LAYERS, HIDDEN, UNITS, EXPERTS, TOP_K = 8, 2880, 2880, 32, 4  # gpt-oss-20b
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
MOST = {1: 1.4, 4: 1.3, 16: 1.3, 64: 1.25, 256: 2.1}  # times floor
PREFILL, LEAST = 4096, 500  # tokens, TFLOP/s
READ = 1 << 28  # bytes of one of LAYERS reads
SCALES = (238, 247)  # stored bytes: numbers of a usual size
FLOP = 6 * HIDDEN * UNITS * TOP_K  # a token


def random_matrix(rows: int, columns: int, pairs: bool) -> Packed:
    def draw(low: int, high: int, size: int) -> torch.Tensor:
        return torch.randint(low, high, (EXPERTS, size), dtype=torch.uint8, device="cuda")

    codes, scales = packed_nbytes(rows, columns)
    return Packed(draw(0, 256, codes), draw(*SCALES, scales), rows, columns, pairs, False)


def random_layer() -> tuple[Router, Experts]:
    def draw(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * scale).bfloat16()

    norm = draw(HIDDEN, scale=0.1) + 1
    router = Router(draw(EXPERTS, HIDDEN, scale=0.03), draw(EXPERTS, scale=0), TOP_K, norm)
    up, down = (
        random_matrix(2 * UNITS, HIDDEN, True),
        random_matrix(HIDDEN, UNITS, False),
    )
    biases = draw(EXPERTS, 2 * UNITS, scale=0.1), draw(EXPERTS, HIDDEN, scale=0.1)
    return router, Experts(up, down, *biases)


def microseconds(run: Callable[[], object]) -> float:
    """Of one layer, the median over replays of a graph of `run`, which does LAYERS."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replays(number: int) -> float:
        start.record()
        for _ in range(number):
            graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / number

    number = max(2, min(20, int(8 / replays(2))))
    return statistics.median(replays(number) for _ in range(7)) / LAYERS * 1e3


@triton.jit
def read_kernel(source, sink, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * TIMES + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(TIMES):
        total += tl.load(source + at + i * BLOCK)
    tl.store(sink + tl.arange(0, BLOCK), total, mask=total == 123456789)


def read_rate() -> float:
    """Bytes a microsecond of a plain read."""
    source = torch.randint(0, 100, (LAYERS, READ // 4), dtype=torch.int32, device="cuda")
    sink = torch.zeros(4096, dtype=torch.int32, device="cuda")
    programs = READ // 4 // (4096 * 8)

    def run() -> None:
        for part in source:
            read_kernel[(programs,)](part, sink, BLOCK=4096, TIMES=8, num_warps=8)

    return READ / microseconds(run)


def measure(tokens: int, layers: list[tuple[Router, Experts]], rate: float) -> dict[str, float]:
    """Microseconds of a layer, of its experts alone, and of its floor."""
    inputs = [torch.randn(tokens, HIDDEN, device="cuda").bfloat16() for _ in layers]
    routed = [route(x, router) for x, (router, _) in zip(inputs, layers, strict=True)]
    touched = statistics.mean(ids.unique().numel() for _, ids, _ in routed)

    def whole() -> None:
        for x, (router, held) in zip(inputs, layers, strict=True):
            y, ids, weights = route_experts(x, router, held)
            reduce_residual_norm(y, ids, weights, x, router.norm_D)

    def alone() -> None:
        for (h, ids, _), (_, held) in zip(routed, layers, strict=True):
            experts(h, ids, held)

    expert = sum(packed_nbytes(2 * UNITS, HIDDEN)) + sum(packed_nbytes(HIDDEN, UNITS))
    return {
        "tokens": tokens,
        "experts": touched,
        "floor": touched * expert / rate,
        "alone": microseconds(alone),
        "layer": microseconds(whole),
    }


def row(found: dict[str, float]) -> str:
    tokens, floor, layer = int(found["tokens"]), found["floor"], found["layer"]
    rates = [f"{tokens * FLOP / found[of] / 1e6:.0f}" for of in ("alone", "layer")]
    most = f"{MOST[tokens]}" if tokens in MOST else ""
    if tokens == PREFILL:
        most = f"{LEAST} TFLOP/s"
    return (
        f"| {tokens} | {found['experts']:.1f} | {floor:.1f} | {found['alone']:.1f} | {layer:.1f}"
        f" | {found['alone'] / floor:.2f} | {layer / floor:.2f} | {most} | {' / '.join(rates)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the numbers there, as JSON")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = HIDDEN, UNITS, torch.bfloat16, TOP_K, EXPERTS, EXPERTS
    trial = self_test(torch.device("cuda"), *shape)
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, reads at {rate / 1e6:.2f} TB/s, safe: {trial.safe}")
    layers = [random_layer() for _ in range(LAYERS)]
    print(
        "| tokens | experts | floor µs | experts alone µs | layer µs | alone / floor"
        " | layer / floor | at most | TFLOP/s alone / layer |"
    )
    print("| --- " * 9 + "|", flush=True)
    found = []
    for tokens in arguments.tokens:
        found.append(measure(tokens, layers, rate))
        print(row(found[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"read": rate, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
