"""Results of `tpx bench latency|throughput|load` as ranks write them, with round numbers."""

from __future__ import annotations

from typing import Any

HEAD: dict[str, Any] = {
    "machine": {"device": "EPYC (AVX2)", "ranks": 2, "threads": 4, "python": "3.11.7",
                "torch": "2.13.0", "tpx": "0.1.0"},
    "model": {"name": "tpx-demo", "dtype": "bfloat16", "plan": "tp2", "mesh": "dp 1 x tp 2"},
    "load_average": [0.5, 1.25],
}  # fmt: skip
PEER = {
    "name": "transformers",
    "version": "5.23.0",
    "threads": 4,
    "chosen": {"1": "grouped_mm experts, dynamic cache", "16": "eager experts, static cache"},
    "refused": {"sonicmoe experts, dynamic cache": "sonic-moe requires the `kernels` package. Use "
                "a different `experts_implementation`."},
}  # fmt: skip
WAYS = ("tpx, kernels on", "tpx, kernels off", "transformers")


def latency() -> dict[str, Any]:
    rows = [
        {"way": way, "batch": batch, "first_token": 0.02 * slow, "token": 0.004 * slow,
         "seconds": 0.528 * slow, "tokens_per_second": batch * 242.4 / slow, "floor": 0.0005,
         "share": 0.125 / slow, "rounds": [0.528 * slow] * 3}
        for batch in (1, 16)
        for way, slow in zip(WAYS, (1, 100, 4), strict=True)
    ]  # fmt: skip
    return {
        "bench": "latency",
        **HEAD,
        "asked": {"input": [128, 128], "output": [128, 128], "batches": [1, 16], "rounds": 3},
        "read_rate": 15.6e9,
        "peer": PEER,
        "rows": rows,
        "same_tokens": [
            {"batch": 1, "sequences": 1, "same": 1, "first_difference": None},
            {"batch": 16, "sequences": 16, "same": 13, "first_difference": 41},
        ],
    }


def throughput() -> dict[str, Any]:
    times = {"p50": 0.0123, "p90": 0.5, "p99": 2.25}
    rows = [
        {"way": way, "seconds": 8.0 * slow, "output_per_second": 1024 / slow,
         "total_per_second": 3072 / slow, "first_token": seen, "token": seen, "floor": 0.4,
         "share": 0.05 / slow, "rounds": [8.0 * slow]}
        for way, slow, seen in (("tpx", 1, times), ("transformers", 8, None))
    ]  # fmt: skip
    return {
        "bench": "throughput",
        **HEAD,
        "asked": {"input": [64, 256], "output": [128, 128], "batches": [16], "rounds": 3,
                  "requests": 64, "rate": None},
        "read_rate": 15.6e9,
        "peer": {**PEER, "chosen": {"16": "eager experts, static cache"}, "refused": {}},
        "rows": rows,
        "same_tokens": [{"batch": 16, "sequences": 64, "same": 64, "first_difference": None}],
    }  # fmt: skip


def one_load(way: str = "tpx", seconds: float = 1.0) -> dict[str, Any]:
    """Of one process, before `merged`."""
    parts = {"start": 0.1, "imports": 1.5, "prepare": 0.25, "load": seconds, "first_token": 0.02}
    row = {"way": way, "parts": parts, "seconds": sum(parts.values()), "bytes_read": 15_500_000,
           "bytes_held": 15_500_000, "rate": 15_500_000 / seconds, "floor": 0.01,
           "share": 0.01 / seconds, "host_peak": 400_000_000, "device_peak": 0}  # fmt: skip
    return {"row": row, **HEAD}
