"""Reads one rank's shards from safetensors files: its RankPlan's byte ranges and no other byte.

Byte ranges, threads and pinned memory live here only. Knows no model, no family and no device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .errors import CheckpointError
from .families.layout import Range
from .plan.types import Part, RankPlan, Shard

# safetensors' names; one byte holds whole elements in each of them.
DTYPES = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
CHUNK = 8 << 20  # bytes one thread reads at a time
THREADS = 8

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Runs(NamedTuple):
    """Contiguous pieces of a file, in bytes: where each lies, where it goes, how long it is."""

    source: np.ndarray
    target: np.ndarray
    nbytes: np.ndarray


@dataclass(slots=True)
class ReadStats:
    """What has been read so far. bytes_read: as the kernel counted; bytes_kept: in tensors;
    seconds: of reading alone."""

    bytes_read: int = 0
    bytes_kept: int = 0
    seconds: float = 0.0


def read_shards(
    rank_plan: RankPlan,
    folder: Path,
    stats: ReadStats,
    progress: Progress | None = None,
    pin: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (parameter, its shard on CPU in the checkpoint's dtype), in the order of the files.

    One tensor is in memory at a time unless the caller keeps it. Tied parameters are not read.
    pin: into page-locked memory, from where a GPU copies directly. Raises CheckpointError.
    """
    shards = {name: s for name, s in rank_plan.shards.items() if s.tied_to is None}
    total = sum(part_bytes(part) for shard in shards.values() for part in shard.parts)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="tpx-read") as pool:
        for name in sorted(shards, key=lambda name: file_order(shards[name])):
            # Yielded at once: a name for it here would keep it while the next one is read.
            yield name, read_shard(shards[name], folder, pool, stats, pin)
            if progress is not None:
                progress(stats.bytes_read, total)


def read_shard(
    shard: Shard, folder: Path, pool: ThreadPoolExecutor, stats: ReadStats, pin: bool
) -> torch.Tensor:
    begin = time.perf_counter()
    data = torch.empty(shard_bytes(shard), dtype=torch.uint8, pin_memory=pin)
    stats.bytes_read += read_into(data.numpy(), shard, folder, pool)
    stats.bytes_kept += data.nbytes
    stats.seconds += time.perf_counter() - begin
    return data.view(DTYPES[shard.dtype]).view(shard.shape)


def file_order(shard: Shard) -> tuple[str, int]:
    return min(((part.meta.file, part.meta.offset) for part in shard.parts), default=("", 0))


def itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def part_bytes(part: Part) -> int:
    return prod(part.shape) * itemsize(part.meta.dtype)


def shard_bytes(shard: Shard) -> int:
    return shard.numel * itemsize(shard.dtype)


def read_into(buffer: np.ndarray, shard: Shard, folder: Path, pool: ThreadPoolExecutor) -> int:
    """Fills `buffer` (uint8, the shard's bytes) with the shard's parts; -> bytes read."""
    done = 0
    for part in shard.parts:
        with opened(folder / part.meta.file) as file:
            pieces = chunks(runs(part, shard))
            jobs = [pool.submit(read_runs, file, part, piece, buffer) for piece in pieces]
            wait(jobs)  # the file stays open until no thread reads it, also after an error
        done += sum(job.result() for job in jobs)
    return done


@contextmanager
def opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(
            f"`{path}` cannot be opened: {error.strerror}", "check that the file is there"
        ) from error
    try:
        yield file
    finally:
        os.close(file)


def read_runs(file: int, part: Part, pieces: Runs, buffer: np.ndarray) -> int:
    """Reads the pieces one by one, outside the GIL; -> bytes read, as preadv counted them."""
    view, preadv, total = buffer.data, os.preadv, 0
    source = 0
    try:
        for source, target, nbytes in zip(*(column.tolist() for column in pieces), strict=True):
            got = preadv(file, [view[target : target + nbytes]], source)
            while got < nbytes:
                more = preadv(file, [view[target + got : target + nbytes]], source + got)
                if more == 0:
                    raise cut_short(part, source + got)
                got += more
            total += got
    except OSError as error:
        raise CheckpointError(
            f"`{part.meta.file}` cannot be read at byte `{source}`, in `{part.meta.name}`: "
            f"{error.strerror}",
            "check the disk that holds it",
        ) from error
    return total


def cut_short(part: Part, offset: int) -> CheckpointError:
    return CheckpointError(
        f"`{part.meta.file}` ends at byte `{offset}`, inside `{part.meta.name}`",
        "the file was cut short after its headers were checked; fetch it again",
    )


def runs(part: Part, shard: Shard) -> Runs:
    """The part's contiguous pieces: as long as source and target both allow."""
    meta, item = part.meta, itemsize(part.meta.dtype)
    shape = (1, *meta.shape)  # a dimension that is never whole, so that a cut one always exists
    index = (((0, 1),), *part.index)
    lead = len(shard.shape) - len(meta.shape)
    target_shape = (1, *shard.shape[lead:])
    offset = sum(at * step for at, step in zip(part.at, steps(shard.shape), strict=True))
    cut = len(shape) - 1
    while cut > 0 and index[cut] == ((0, shape[cut]),) and target_shape[cut] == shape[cut]:
        cut -= 1
    source, target = steps(shape), steps(target_shape)
    from_outer = outer([chosen(index[d]) * source[d] for d in range(cut)])
    to_outer = outer([np.arange(len(chosen(index[d]))) * target[d] for d in range(cut)])
    starts, stops = np.array(index[cut], np.int64).reshape(-1, 2).T
    lengths = stops - starts
    places = np.cumsum(lengths) - lengths
    return merged(
        Runs(
            meta.offset + item * outer([from_outer, starts * source[cut]]),
            item * (offset + outer([to_outer, places * target[cut]])),
            np.tile(item * lengths * source[cut], len(from_outer)),
        )
    )


def steps(shape: tuple[int, ...]) -> list[int]:
    """Elements from one index to the next, a dimension each, row-major."""
    return [prod(shape[d + 1 :]) for d in range(len(shape))]


def chosen(ranges: tuple[Range, ...]) -> np.ndarray:
    spans = [np.arange(start, stop, dtype=np.int64) for start, stop in ranges]
    return np.concatenate([np.arange(0), *spans])


def outer(columns: list[np.ndarray]) -> np.ndarray:
    """All sums of one entry from each column, the last column varying fastest."""
    total = np.zeros(1, np.int64)
    for column in columns:
        total = (total[:, None] + column[None, :]).reshape(-1)
    return total


def merged(pieces: Runs) -> Runs:
    """Joins pieces that touch in the file and in the target; drops empty ones."""
    pieces = Runs(*(column[pieces.nbytes > 0] for column in pieces))
    ends = pieces.source[:-1] + pieces.nbytes[:-1], pieces.target[:-1] + pieces.nbytes[:-1]
    joined = (ends[0] == pieces.source[1:]) & (ends[1] == pieces.target[1:])
    first = np.flatnonzero(np.concatenate([[True], ~joined])[: len(pieces.nbytes)])
    if len(first) == 0:
        return pieces
    lengths = np.add.reduceat(pieces.nbytes, first)
    return Runs(pieces.source[first], pieces.target[first], lengths)


def chunks(pieces: Runs, most: int = CHUNK) -> Iterator[Runs]:
    """The same pieces in jobs of about `most` bytes; longer ones are cut."""
    count = -(-pieces.nbytes // most)
    piece = np.repeat(np.arange(len(count)), count)
    skip = most * (np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count))
    nbytes = np.minimum(pieces.nbytes[piece] - skip, most)
    cut = Runs(pieces.source[piece] + skip, pieces.target[piece] + skip, nbytes)
    job = np.cumsum(nbytes) // most
    for start, stop in zip(*edges(job), strict=True):
        yield Runs(*(column[start:stop] for column in cut))


def edges(job: np.ndarray) -> tuple[list[int], list[int]]:
    """Where each run of equal values starts and stops."""
    starts = [0, *(np.flatnonzero(np.diff(job)) + 1).tolist()] if len(job) else []
    return starts, [*starts[1:], len(job)][: len(starts)]
