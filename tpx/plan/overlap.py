"""Stretches of files that the spans of several ranks cover, and what of a rank's lies outside."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .spans import Copy, Piece, Span, Window, clipped, join

Items = Mapping[str, int]  # bytes of an element, by parameter


def overlaps(alone: Sequence[Sequence[Span]], items: Sequence[Items], gap: int) -> list[Window]:
    """What at least two ranks read, ascending, cut so that whole elements of every rank lie at
    multiples of their size from the start. alone, items: by rank."""
    found = _stretches(alone, gap)
    pieces = [
        piece
        for mine, sizes in zip(alone, items, strict=True)
        for window, copies in zip(found, clipped(mine, found), strict=True)
        for piece in _pieces(window, copies, sizes)
    ]
    return [Window(*span[:3]) for span in join(sorted(pieces), gap)]


def _stretches(alone: Sequence[Sequence[Span]], gap: int) -> list[Window]:
    """What at least two spans cover, and up to `gap` bytes beside and between that one does: the
    first and last rows of slices, which begin and end a little apart."""
    found: list[tuple[str, int, int]] = []
    at, begin, end = "", 0, 0  # bytes that are covered without a hole so far

    def close() -> None:
        if found and found[-1][0] == at and end - found[-1][2] <= gap:
            found[-1] = (at, found[-1][1], end)

    for file, start, stop in sorted((s.file, s.offset, s.end) for mine in alone for s in mine):
        if file != at or start > end:
            close()
            at, begin, end = file, start, start
        if start < end:
            low = begin if start - begin <= gap else start
            high = min(end, stop)
            if found and found[-1][0] == file and low - found[-1][2] <= gap:
                _, low, before = found.pop()
                high = max(high, before)
            found.append((file, low, high))
        end = max(end, stop)
    close()
    return [Window(file, low, high - low) for file, low, high in found]


def _pieces(window: Window, copies: Iterable[Copy], items: Items) -> Iterator[Piece]:
    for copy in copies:
        start = window.offset + copy.source
        yield window.file, start, start + copy.end - copy.source, items[copy.parameter], copy


class Divided(NamedTuple):
    """own: what of a rank's spans is outside the windows, ascending. met: its spans that meet one,
    whole."""

    own: tuple[Span, ...]
    met: tuple[Span, ...]


def divide(mine: Sequence[Span], items: Items, windows: Sequence[Window], gap: int) -> Divided:
    """One rank's spans, by windows that are ascending and disjoint."""
    begins = [(window.file, window.offset) for window in windows]
    ends = [(window.file, window.end) for window in windows]
    own: list[Span] = []
    met: list[Span] = []
    for span in mine:
        first = bisect_right(ends, (span.file, span.offset))
        last = bisect_left(begins, (span.file, span.end))
        if first >= last:
            own.append(span)
            continue
        met.append(span)
        for hole in _holes(span, windows[first:last]):
            [copies] = clipped([span], [hole])
            own += join(_pieces(hole, copies, items), gap)
    return Divided(tuple(own), tuple(met))


def _holes(span: Span, windows: Sequence[Window]) -> Iterator[Window]:
    """What of the span lies outside the windows that meet it."""
    start = span.offset
    for begin, end in [*((w.offset, w.end) for w in windows), (span.end, span.end)]:
        if begin > start:
            yield Window(span.file, start, begin - start)
        start = end
