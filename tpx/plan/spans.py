"""A RankPlan as stretches of files: which bytes a rank reads, in order, and where each one goes.

Arithmetic alone, so that a plan's reading can be printed before a process is started. A slice of
millions of rows is one Copy; runs of bytes are joined into a span where that is faster than a read
of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

from ..families.layout import Range
from ..index import DTYPE_BITS
from .types import Part, RankPlan, Shard

# Runs at most so many bytes apart are read together and the bytes between dropped. Measured on two
# cores, 8 threads, runs of 16 KiB to 1 MiB: from the page cache and from the disk one read is
# faster at 16 KiB, as fast at 32 KiB, and slower from 64 KiB on (docs/performance.md).
GAP = 32 << 10


class Copy(NamedTuple):
    """`rows` pieces of `nbytes` bytes that a parameter's shard keeps.

    source: byte of the first one, from the start of the span or the read. target: its byte in the
    shard as the checkpoint stores it, row-major. The steps lead from piece to piece; 0 for one row.
    """

    parameter: str
    source: int
    target: int
    nbytes: int
    rows: int
    source_step: int
    target_step: int

    @property
    def end(self) -> int:
        """The source's byte after the last piece."""
        return self.source + (self.rows - 1) * self.source_step + self.nbytes

    @property
    def kept(self) -> int:
        return self.rows * self.nbytes


class Span(NamedTuple):
    """A stretch of one file that is read in order. copies: in order of their source; a span's own
    cover its first and its last byte."""

    file: str
    offset: int
    nbytes: int
    copies: tuple[Copy, ...]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class Window(NamedTuple):
    """Bytes of a file, whoever keeps them."""

    file: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


# File, first byte, byte after the last, bytes of an element, the copy (whose source is not used).
Piece = tuple[str, int, int, int, Copy]


def spans(rank_plan: RankPlan, gap: int = GAP) -> list[Span]:
    """What the rank reads, by (file, offset); tied parameters are not read.

    Runs at most `gap` bytes apart are one span, also of several tensors. A copy begins a whole
    number of its elements after the span's first byte, so that no element lies in two reads of a
    multiple of 8 bytes.
    """
    found: list[Piece] = []
    for name, shard in rank_plan.shards.items():
        for part in () if shard.tied_to else shard.parts:
            file, item = part.meta.file, item_bytes(part.meta.dtype)
            for whole in copies_of(name, part, shard):
                found += [(file, c.source, c.end, item, c) for c in _apart(whole, gap)]
    found.sort()
    return list(join(found, gap))


def item_bytes(dtype: str) -> int:
    """Of one element; dtypes of less than a byte are in no layout."""
    size, rest = divmod(DTYPE_BITS[dtype], 8)
    assert rest == 0, f"{dtype=}"
    return size


def join(found: Iterable[Piece], gap: int) -> Iterator[Span]:
    """Spans of pieces that ascend."""
    held: list[Copy] = []
    name, begin, end = "", 0, 0
    for file, start, stop, item, copy in found:
        near = file == name and start - end <= gap and (start - begin) % item == 0
        if held and not near:
            yield Span(name, begin, end - begin, tuple(held))
            held = []
        if not held:
            name, begin, end = file, start, stop
        held.append(Copy(copy[0], start - begin, *copy[2:]))
        end = max(end, stop)
    if held:
        yield Span(name, begin, end - begin, tuple(held))


def _apart(copy: Copy, gap: int) -> Iterator[Copy]:
    """The copy, or each of its rows where they lie too far apart to be read together."""
    if copy.source_step - copy.nbytes <= gap:
        yield copy
        return
    name, source, target, nbytes, rows, step, jump = copy
    for row in range(rows):
        yield Copy(name, source + row * step, target + row * jump, nbytes, 1, 0, 0)


def copies_of(name: str, part: Part, shard: Shard) -> Iterator[Copy]:
    """The part's pieces, each as long as source and target allow; source: from the file's start."""
    item = item_bytes(part.meta.dtype)
    to = _steps(shard.shape, item)
    base = sum(at * step for at, step in zip(part.at, to, strict=True))
    to = to[len(to) - len(part.meta.shape) :]
    by = _steps(part.meta.shape, item)
    for box in product(*(_placed(ranges) for ranges in part.index)):
        source, target, levels = part.meta.offset, base, []
        for (start, length, place), step, jump in zip(box, by, to, strict=True):
            source, target = source + start * step, target + place * jump
            levels.append((length, step, jump))
        nbytes, rows = _collapsed(levels, item)
        (count, step, jump), outer = rows[-1], rows[:-1]
        for steps in product(*([(i * s, i * t) for i in range(n)] for n, s, t in outer)):
            more, on = sum(s for s, _ in steps), sum(t for _, t in steps)
            yield Copy(name, source + more, target + on, nbytes, count, step, jump)


def _steps(shape: tuple[int, ...], item: int) -> list[int]:
    """Bytes from one index to the next, a dimension each, row-major."""
    return [item * prod(shape[d + 1 :]) for d in range(len(shape))]


def _placed(ranges: tuple[Range, ...]) -> list[tuple[int, int, int]]:
    """(start, length, place among the chosen) of each range that is not empty; touching ones are
    one."""
    found: list[tuple[int, int, int]] = []
    place = 0
    for start, stop in ranges:
        if found and sum(found[-1][:2]) == start:
            before, length, at = found.pop()
            found.append((before, length + stop - start, at))
        elif stop > start:
            found.append((start, stop - start, place))
        place += stop - start
    return found


def _collapsed(
    levels: list[tuple[int, int, int]], item: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Bytes of the contiguous run, and (count, source's step, target's step) of the levels around
    it, at least one, outermost first; levels that step evenly are one."""
    nbytes, found = item, list[tuple[int, int, int]]()
    for count, step, jump in reversed(levels):
        if count == 1:
            continue
        if not found and step == jump == nbytes:
            nbytes *= count
        elif found and (step, jump) == (found[0][0] * found[0][1], found[0][0] * found[0][2]):
            found[0] = (count * found[0][0], *found[0][1:])
        else:
            found.insert(0, (count, step, jump))
    return nbytes, found or [(1, 0, 0)]


def cut(span: Span, most: int) -> Iterator[Span]:
    """The same bytes in reads of at most `most`, a multiple of 4096; rows that straddle two are
    split."""
    assert most % 4096 == 0 < most, f"{most=}"
    starts = range(span.offset, span.end, most)
    windows = [Window(span.file, a, b - a) for a, b in pairwise([*starts, span.end])]
    for window, copies in zip(windows, clipped([span], windows), strict=True):
        yield Span(*window, copies)


def clipped(spans: Iterable[Span], windows: Iterable[Window]) -> Iterator[tuple[Copy, ...]]:
    """For each window: what of the spans' copies lies in it, counted from its first byte.

    Both ascend by (file, offset); windows are disjoint and cut no element.
    """
    coming = (
        (span.file, span.offset + copy.source, copy) for span in spans for copy in span.copies
    )
    after = next(coming, None)
    near: list[tuple[str, int, Copy]] = []  # that may reach into the next window, too
    for file, offset, nbytes in windows:
        end = offset + nbytes
        while after is not None and after[:2] < (file, end):
            near.append(after)
            after = next(coming, None)
        near = [n for n in near if n[0] == file and n[1] + n[2].end - n[2].source > offset]
        found = [
            piece
            for _, start, copy in near
            for piece in _clip(copy, offset - start + copy.source, end - start + copy.source)
        ]
        yield tuple(sorted(found, key=_source))


def _source(copy: Copy) -> int:
    return copy.source


def _clip(copy: Copy, low: int, high: int) -> Iterator[Copy]:
    """The copy's bytes in [low, high), with sources from `low`: at most a part of a row, whole
    rows, and a part of another."""
    name, source, target, nbytes, rows, step, jump = copy
    step = step or nbytes
    first = max(0, (low - source - nbytes) // step + 1)  # that ends after `low`
    last = min(rows - 1, (high - 1 - source) // step)  # that begins before `high`
    if first > last:
        return

    def part(row: int) -> Copy:
        begin = source + row * step
        start, stop = max(begin, low), min(begin + nbytes, high)
        return Copy(name, start - low, target + row * jump + start - begin, stop - start, 1, 0, 0)

    if first == last:
        yield part(first)
        return
    head = source + first * step < low
    tail = source + last * step + nbytes > high
    if head:
        yield part(first)
    start, stop = first + head, last + 1 - tail
    if stop - start == 1:
        yield part(start)
    elif stop > start:
        begin = source + start * step - low
        yield Copy(name, begin, target + start * jump, nbytes, stop - start, step, jump)
    if tail:
        yield part(last)
