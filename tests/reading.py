"""One rank's shards, read without a model; and sources that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch

from tpx.errors import CheckpointError
from tpx.index import FileId, TensorMeta
from tpx.plan.prepare import Prepared
from tpx.plan.spans import spans
from tpx.plan.types import Part, Shard
from tpx.read import DTYPES, Arena, Files, Limits, ReadStats, Source, load_spans


def one_shard(shape: tuple[int, ...], dtype: str, name: str = "p") -> dict[str, Shard]:
    """A parameter that is the whole of a tensor, from the first byte of `file`."""
    nbytes = prod(shape) * DTYPES[dtype].itemsize
    ranges = tuple(((0, size),) for size in shape)
    part = Part(TensorMeta(name, "file", dtype, shape, 0, nbytes), ranges, (0,) * len(shape))
    return {name: Shard(shape, dtype, (part,), "replicate", 1, ranges)}


def ids_of(folder: Path) -> dict[str, FileId]:
    return {path.name: FileId.of(path.stat()) for path in folder.iterdir()}


def load_rank(
    prepared: Prepared,
    rank: int,
    folder: Path | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
    around: Callable[[Files], Source] = lambda files: files,
    load: Callable[..., None] = load_spans,
) -> tuple[dict[str, torch.Tensor], ReadStats]:
    """The shards in the checkpoint's dtypes. folder: where other files of the same names lie.
    around: gives the source that is read instead of the files."""
    plan, stats = prepared.rank_plan(rank), ReadStats(progress)
    arena = Arena(plan, torch.bfloat16, torch.device("cpu"))
    ids = ids_of(folder) if folder else prepared.index.files
    with Files(folder or prepared.folder, ids) as files:
        load(spans(plan), around(files), arena, stats, limits)
        files.check()
    return {name: arena.view(name) for name in arena.slots}, stats


def error_of(act: Callable[[], object]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        act()
    return caught.value


def touch(path: Path) -> None:
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
