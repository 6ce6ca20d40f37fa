"""Loading on a CPU against the disk and the memory: bytes, memory and seconds.

    python scripts/bench_load.py --folder /tmp/bench-load --runs 5
    python scripts/bench_load.py --cuda /tmp/gpt-oss-20b              # bench_load_gpu.py

A file of eight expert tensors [32, 5760, 90, 16] and their scales, 2.26 GB, of which a rank loads a
slice of the experts' dimension or of the rows'; then four ranks at once, a quarter each. Beside it
safetensors' `get_slice` in a loop, twice: `view`, what it gives, a view of a mapping of the file,
with every page touched; `copy`, the same in memory of its own, as tpx gives it, which a file that
shrinks cannot take away. Each run is a process of its own; before a cold one the page cache is
dropped. Floors, by two threads: the same bytes read into buffers that are used again (`read`), and
into memory that is new (`new`), whose pages the kernel must clear first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_floor import parallel_reads
from safetensors import __version__ as safetensors_version, safe_open

from tpx.index import CheckpointIndex
from tpx.plan.spans import Span, spans
from tpx.plan.types import Part, Shard
from tpx.read import Arena, Files, ReadStats, load_spans
from tpx.read.arena import empty
from tpx.read.stats import anonymous_bytes

FILE = "model.safetensors"
SHAPE = (32, 5760, 90, 16)
TENSORS = 8
CPU = torch.device("cpu")
WAYS = ("tpx", "view", "copy", "read", "new")


class Slice(NamedTuple):
    """Of one dimension of every tensor."""

    dim: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{('experts', 'rows')[self.dim]} {self.start}:{self.stop}"


ONE_RANK = [[Slice(0, 4, 8)], [Slice(1, 720, 1440)]]
FOUR_RANKS = [
    [Slice(0, start, start + 8) for start in range(0, 32, 8)],
    [Slice(1, start, start + 1440) for start in range(0, 5760, 1440)],
]


class Run(NamedTuple):
    """One rank's load. disk: bytes read from it. memory: anonymous bytes beside the tensors."""

    seconds: float
    disk: int
    kept: int
    memory: int


class Held(NamedTuple):
    """As much of a RankPlan as reading needs."""

    shards: dict[str, Shard]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, help="of the file, which is written if it is not there"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each way, cold and warm")
    parser.add_argument("--cuda", type=Path, metavar="MODEL", help="a checkpoint's folder")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.folder, options.one[0], Slice(*json.loads(options.one[1])))
    elif options.cuda:
        from bench_load_gpu import bench

        bench(options.cuda, options.runs)
    elif options.folder:
        bench_cpu(options.folder, options.runs)
    else:
        parser.error("give --folder or --cuda")


def bench_cpu(folder: Path, runs: int) -> None:
    path = folder / FILE
    if not path.exists():
        write_file(path)
    versions = f"torch {torch.__version__}, safetensors {safetensors_version}"
    print(f"{processor()}, {os.cpu_count()} cores; {versions}; {path.stat().st_size / 1e9:.2f} GB")
    print(
        f"{'slice':<22}{'cache':<6}{'way':<6}{'best s':>8}{'median':>8}{'disk/kept':>11}{'MiB':>7}"
    )
    for ranks in [*ONE_RANK, *FOUR_RANKS]:
        for cache in ("cold", "warm"):
            ways = WAYS if len(ranks) == 1 else WAYS[:3]
            found = measured(path, ranks, cache, ways, runs)
            report(ranks, cache, found)


def measured(
    path: Path, ranks: Sequence[Slice], cache: str, ways: Sequence[str], runs: int
) -> dict[str, list[list[Run]]]:
    """For each way, each run's ranks. The ways take turns, so that none has the quieter machine."""
    found: dict[str, list[list[Run]]] = {way: [] for way in ways}
    for _ in range(runs):
        for way in ways:
            if cache == "cold":
                os.sync()
                drop(path)
            else:
                read_all(path)
            found[way].append(run(path.parent, way, ranks))
    return found


def report(ranks: Sequence[Slice], cache: str, found: dict[str, list[list[Run]]]) -> None:
    name = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}, 4 ranks"
    best = {}
    for way, runs in found.items():
        seconds = [max(run.seconds for run in each) for each in runs]
        disk = median(sum(run.disk for run in each) for each in runs)
        kept = sum(run.kept for run in runs[0])
        memory = max(run.memory for run in chain.from_iterable(runs)) / 2**20
        best[way] = min(seconds), median(seconds)
        print(
            f"{name:<22}{cache:<6}{way:<6}{best[way][0]:>8.3f}{best[way][1]:>8.3f}"
            f"{disk / kept:>11.3f}{memory:>7.1f}"
        )
    for other in ("view", "copy"):
        times = [mine / its for its, mine in zip(best["tpx"], best[other], strict=True)]
        print(f"{'':<28}{times[0]:.2f} times as fast as `{other}`, by the median {times[1]:.2f}")


def run(folder: Path, way: str, ranks: Sequence[Slice]) -> list[Run]:
    """Starts the ranks together, once all have imported what they need."""
    command = [sys.executable, __file__, "--folder", str(folder), "--one", way]
    jobs = [
        subprocess.Popen(
            [*command, json.dumps(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for part in ranks
    ]
    for job in jobs:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("go\n")
        job.stdin.flush()
    return [Run(*json.loads(job.communicate()[0])) for job in jobs]


def one(folder: Path, way: str, part: Slice) -> None:
    """In a process of its own: loads when a line comes in, and prints its Run."""
    index = CheckpointIndex.open(folder)
    print("ready", flush=True)
    sys.stdin.readline()
    disk, begin = read_from_disk(), time.perf_counter()
    kept, memory = LOADS[way](index, part)
    print(json.dumps(Run(time.perf_counter() - begin, read_from_disk() - disk, kept, memory)))


def load_tpx(index: CheckpointIndex, part: Slice) -> tuple[int, int]:
    plan, stats = held(index, part), ReadStats()
    arena = Arena(plan, torch.bfloat16, CPU)
    with Files(index.folder, index.files) as files:
        load_spans(spans(plan), files, arena, stats)
        files.check()
    return stats.bytes_kept, stats.host_peak - stats.bytes_kept


def load_views(index: CheckpointIndex, part: Slice) -> tuple[int, int]:
    before, found = anonymous_bytes(), list(sliced(index, part))
    for tensor in found:
        for expert in tensor:  # which is contiguous
            expert.view(-1)[::4096].sum()
    return sum(tensor.nbytes for tensor in found), anonymous_bytes() - before


def load_copies(index: CheckpointIndex, part: Slice) -> tuple[int, int]:
    before, found = anonymous_bytes(), [tensor.clone() for tensor in sliced(index, part)]
    kept = sum(tensor.nbytes for tensor in found)
    return kept, anonymous_bytes() - before - kept


def sliced(index: CheckpointIndex, part: Slice) -> Iterator[torch.Tensor]:
    with safe_open(index.folder / FILE, "pt") as file:
        for name in file.keys():
            found = file.get_slice(name)
            if part.dim == 0:
                yield found[part.start : part.stop]
            else:
                yield found[:, part.start : part.stop]


def read_again(index: CheckpointIndex, part: Slice) -> tuple[int, int]:
    found = spans(held(index, part))
    buffers = [empty(4 << 20, CPU).numpy().data for _ in range(2)]
    parallel_reads(index.folder, found, lambda thread, read, at: buffers[thread], len(buffers))
    return kept_of(found), 0


def read_new(index: CheckpointIndex, part: Slice) -> tuple[int, int]:
    found = spans(held(index, part))
    memory = empty(kept_of(found), CPU).numpy().data
    parallel_reads(index.folder, found, lambda thread, read, at: memory[at:], 2)
    return kept_of(found), 0


LOADS = {
    "tpx": load_tpx,
    "view": load_views,
    "copy": load_copies,
    "read": read_again,
    "new": read_new,
}


def kept_of(found: Sequence[Span]) -> int:
    return sum(span.nbytes for span in found)


def held(index: CheckpointIndex, part: Slice) -> Held:
    """A slice of every tensor, as a plan would cut it."""

    def shard(meta: Any) -> Shard:
        ranges = [((0, size),) for size in meta.shape]
        ranges[part.dim] = ((part.start, part.stop),)
        shape = tuple(stop - start for ((start, stop),) in ranges)
        piece = Part(meta, tuple(ranges), (0,) * len(shape))
        return Shard(shape, meta.dtype, (piece,), "expert", 0, tuple(ranges))

    return Held({name: shard(meta) for name, meta in index.tensors.items()})


def write_file(path: Path) -> None:
    tensors, begin = {}, 0
    for i in range(TENSORS):
        for kind, shape in (("blocks", SHAPE), ("scales", SHAPE[:3])):
            end = begin + int(np.prod(shape))
            tensors[f"experts.{i}.{kind}"] = {
                "dtype": "U8", "shape": shape, "data_offsets": [begin, end]
            }  # fmt: skip
            begin = end
    header = json.dumps(tensors).encode()
    draw = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while begin:
            begin -= file.write(draw.bytes(min(begin, 64 << 20)))


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(path: Path) -> None:
    buffer = bytearray(4 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_from_disk() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def processor() -> str:
    found = [
        x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
    ]
    return found[0].partition(": ")[2] if found else platform.machine()


if __name__ == "__main__":
    main()
