"""Reads that are made together: many short ones cost as little as a long one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..plan.spans import Copy, Span, cut

ALIGNMENT = 8  # bytes; of a read in a buffer, from where elements are copied and cast


class Laid(NamedTuple):
    """A read, and the byte of a buffer where it begins."""

    at: int
    read: Span


class Batch(NamedTuple):
    """Reads in the order of the files, one behind the other in a buffer; nbytes: of the buffer."""

    laid: tuple[Laid, ...]
    nbytes: int

    @property
    def bytes_read(self) -> int:
        return sum(read.nbytes for _, read in self.laid)

    @property
    def bytes_kept(self) -> int:
        return sum(copy.kept for _, read in self.laid for copy in read.copies)


def batches(spans: Iterable[Span], most: int) -> Iterator[Batch]:
    """All of the spans, in batches of at most `most` bytes, a multiple of 4096."""
    laid, end = list[Laid](), 0
    for read in (read for span in spans for read in cut(span, most)):
        at = -(-end // ALIGNMENT) * ALIGNMENT
        if laid and at + read.nbytes > most:
            yield Batch(tuple(laid), end)
            laid, at = [], 0
        laid.append(Laid(at, read))
        end = at + read.nbytes
    if laid:
        yield Batch(tuple(laid), end)


def copies_of(laid: Iterable[Laid]) -> Iterator[Copy]:
    """The reads' copies, with sources in the buffer."""
    for at, read in laid:
        for copy in read.copies:
            yield copy._replace(source=at + copy.source) if at else copy
