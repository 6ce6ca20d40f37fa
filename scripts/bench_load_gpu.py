"""Loading on a GPU against its floors, all in one run: `bench_load.py --cuda MODEL`.

read: all bytes of the files out of the page cache, by as many threads, into page-locked buffers
that are used again. copy: as many bytes from such a buffer to the device. A load cannot be faster
than the slower of the two; it is to take at most 1.15 times as long. weights: from a RankPlan to
all bytes where they are held, with the arena's allocation and page-locked memory that is new each
time. load_model: the model's modules too. The CUDA context is made before.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from bench_floor import parallel_reads

from tpx.comm import Groups
from tpx.models.load import LoadReport, load_model
from tpx.plan.prepare import Prepared, prepare
from tpx.plan.spans import spans
from tpx.read import Arena, Files, Limits, ReadStats, device, load_spans

BAR = 1.15
GPU = torch.device("cuda")
MIB = 1 << 20
TRIED = [
    Limits(threads, most * MIB, buffers)
    for threads, most, buffers in ((8, 4, 16), (12, 8, 16), (12, 4, 16), (16, 4, 32))
]


def bench(model: Path, runs: int) -> None:
    prepared = prepare(model, "tp1", 1)
    torch.zeros(1, device=GPU)
    nbytes = sum(span.nbytes for span in spans(prepared.rank_plan(0)))
    name = torch.cuda.get_device_name()
    print(f"{name}, {os.cpu_count()} cores; torch {torch.__version__}; {nbytes / 1e9:.2f} GB")
    floors = {"read, 8 threads": lambda: read_floor(prepared, 8)}
    floors["read, 16 threads"] = lambda: read_floor(prepared, 16)
    floors["copy"] = lambda: copy_floor(nbytes)
    found = {what: show(what, act, runs, nbytes) for what, act in floors.items()}
    floor = max(min(found["read, 8 threads"], found["read, 16 threads"]), found["copy"])
    for limits in TRIED:
        what = f"weights: {limits.threads} threads, {limits.buffers} x {limits.most // MIB} MiB"
        show(what, lambda limits=limits: load_weights(prepared, limits), runs, nbytes)  # type: ignore[misc]
    with without_cpp():
        show("weights, Python alone", lambda: load_weights(prepared, None), runs, nbytes)
    weights = show("weights as shipped", lambda: load_weights(prepared, None), runs, nbytes)
    reports = list[LoadReport]()
    seconds = show("load_model", lambda: load(prepared, reports), runs, nbytes)
    print(json.dumps(reports[-1]._asdict()))
    print(
        f"weights in {weights / floor:.2f} times the floor (bar {BAR}), {weights:.2f} s (bar 2.5)"
    )
    print(f"load_model in {seconds / floor:.2f} times the floor")
    print(f"device memory at its peak {reports[-1].device_peak:.4f} times final (bar 1.03)")


def show(what: str, act: Callable[[], float | None], runs: int, nbytes: int) -> float:
    """Prints best and median; -> the best. act: may say itself how long it took."""
    seconds = []
    for _ in range(runs):
        give_back()
        begin = time.perf_counter()
        said = act()
        torch.cuda.synchronize()
        seconds.append(said or time.perf_counter() - begin)
    best = min(seconds)
    print(
        f"{what:<34}{best:>8.3f}{median(seconds):>8.3f} s{nbytes / best / 1e9:>8.1f} GB/s",
        flush=True,
    )
    return best


def give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    forget = getattr(torch._C, "_accelerator_emptyHostCache", None) or torch._C._host_emptyCache
    forget()  # page-locked memory, which torch keeps


def read_floor(prepared: Prepared, threads: int) -> float:
    found = spans(prepared.rank_plan(0))
    ring = torch.empty(threads * (4 << 20), dtype=torch.uint8, pin_memory=True).numpy().data
    begin = time.perf_counter()
    parallel_reads(
        prepared.folder, found, lambda thread, read, at: ring[thread * (4 << 20) :], threads
    )
    return time.perf_counter() - begin


def copy_floor(nbytes: int) -> float:
    most = 64 << 20
    ring = torch.empty(most, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=GPU)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for start in range(0, nbytes, most):
        piece = target[start : start + most]
        piece.copy_(ring[: len(piece)], non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def load_weights(prepared: Prepared, limits: Limits | None) -> float:
    plan, begin = prepared.rank_plan(0), time.perf_counter()
    arena = Arena(plan, torch.bfloat16, GPU)
    with Files(prepared.folder, prepared.index.files) as files:
        load_spans(spans(plan), files, arena, ReadStats(), limits)
        files.check()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@contextmanager
def without_cpp() -> Iterator[None]:
    """As where there is no compiler."""
    found, device.sender = device.sender, lambda stream: None
    try:
        yield
    finally:
        device.sender = found


def load(prepared: Prepared, reports: list[LoadReport]) -> float:
    plan = prepared.rank_plan(0)
    _, report = load_model(prepared, plan, Groups.alone(GPU), torch.bfloat16, GPU)
    reports.append(report)
    return report.seconds
