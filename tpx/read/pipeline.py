"""Spans into an arena: threads read in the order of the files, with bounded memory beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import NamedTuple

from ..plan.spans import Span
from .arena import Arena
from .batches import copies_of
from .copies import scatter
from .device import Device
from .files import Source
from .host import Host
from .jobs import jobs
from .readers import Filled, Readers
from .ring import Ring
from .stats import ReadStats


class Limits(NamedTuple):
    """threads: that read. most: bytes of a buffer, a multiple of 4096. buffers: that there are at
    most."""

    threads: int
    most: int
    buffers: int


ON_CPU = Limits(threads=8, most=4 << 20, buffers=4)
ON_GPU = Limits(threads=12, most=4 << 20, buffers=24)


def load_spans(
    spans: Sequence[Span],
    source: Source,
    arena: Arena,
    stats: ReadStats,
    limits: Limits | None = None,
) -> None:
    """Reads the spans into the arena. Of several errors the first in the order of the reads is
    raised, when no thread reads any more. Raises CheckpointError."""
    if arena.device.type == "cuda":
        _to_device(spans, source, arena, stats, limits or ON_GPU)
    else:
        _to_host(spans, source, arena, stats, limits or ON_CPU)


def _to_host(
    spans: Sequence[Span], source: Source, arena: Arena, stats: ReadStats, limits: Limits
) -> None:
    ring = Ring(limits.buffers, limits.most)
    host = Host(arena, ring)
    readers = Readers(host.jobs(spans, limits.most), source, stats, ring.close)
    with closing(readers.run(limits.threads, host.waiting)) as filled:
        for laid, buffer in filled:
            begin = time.perf_counter()
            scatter(copies_of(laid), buffer.data, arena)
            ring.give(buffer)
            stats.copy_seconds += time.perf_counter() - begin


def _to_device(
    spans: Sequence[Span], source: Source, arena: Arena, stats: ReadStats, limits: Limits
) -> None:
    ring, waiting = Ring(limits.buffers, limits.most, pin=True), SimpleQueue[Filled | None]()
    device = Device(arena, limits.most)
    todo = jobs(spans, source, arena, ring, device, waiting)
    readers = Readers(todo, source, stats, ring.close)
    with device.copying(), closing(readers.run(limits.threads, waiting)) as filled:
        for laid, buffer in filled:
            device.copy(laid, buffer)
            ring.give(buffer, device.mark(buffer))
    stats.copy_seconds += device.seconds
