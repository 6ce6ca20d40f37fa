"""The type of a value in one rank: replicated, cut along a logical dimension, or a partial sum.

Exact units stand for {replicated, shard(d), partial}: which units of a dimension a rank holds,
which it has summed, how often, and whose tokens they are. Knows no step and no collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from ..families.layout import Dim, Logical, Range

Box = tuple[Range, ...]  # of some dimensions, the units of each
Token = tuple[int, int, int]  # (dp, i, n): slice i of n of the tokens of a dp group


class Bias(NamedTuple):
    """One that a rank adds to its partial sum, or leaves to another. dims: units it belongs to."""

    name: str
    dims: tuple[tuple[str, Range], ...]
    added: bool


class Value(NamedTuple):
    """dims: logical dimensions it has, with the units here. over: those that its sum runs over,
    none once it is whole; boxes: the pieces of them that are in it, each as often as it was added.
    biases: those that the sum needs. source: the parameters that began the sum."""

    dims: tuple[tuple[str, Range], ...]
    tokens: tuple[Token, ...]
    over: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    biases: tuple[Bias, ...] = ()
    source: tuple[str, ...] = ()

    def held(self, dim: str) -> Range | None:
        return next((units for name, units in self.dims if name == dim), None)


Sizes = Mapping[str, Logical]


def adds_nothing(value: Value) -> bool:
    """Whether it is a sum over no units and without a bias: zeros, whatever they are added to."""
    added = any(bias.added for bias in value.biases)
    return bool(value.over) and not added and all(_empty(box) for box in value.boxes)


def missing(value: Value, dims: Sizes) -> str | None:
    """What the sum is, if not each unit once: None, or a phrase."""
    if not value.over:
        return None
    full = tuple((0, dims[name].size) for name in value.over)
    if value.boxes == (full,):
        return None
    times = {count for box, count in Counter(value.boxes).items() if not _empty(box)}
    if times and min(times) > 1:
        return f"is added {min(times)} times"
    return None if tiles(value.boxes, full) else "is added up in part only"


def missing_bias(value: Value, dims: Sizes) -> tuple[str, str] | None:
    """A bias that is not in the sum exactly once: (its name, a phrase); None: all are."""
    for name in {bias.name: None for bias in value.biases}:
        there = [bias.dims for bias in value.biases if bias.name == name and bias.added]
        if not there:
            return name, "is added by no rank"
        boxes = [tuple(units for _, units in held) for held in there]
        times = max(Counter(boxes).values())
        if times > 1:
            return name, f"is added {times} times"
        full = tuple((0, dims[key].size) for key, _ in there[0])
        if full and not tiles(boxes, full):
            return name, "is added by some ranks only"
    return None


def _empty(box: Box) -> bool:
    return any(start >= stop for start, stop in box)


def tiles(boxes: Iterable[Box], full: Box) -> bool:
    """Whether boxes that lie on a grid fill `full`, each element once. Empty ones do not count."""
    there = [box for box in boxes if not _empty(box)]
    if len(there) == 1 or not full:
        return there == [full]
    if len(set(there)) != len(there):
        return False
    count = 1
    for i, (start, stop) in enumerate(full):
        at = start
        ranges = sorted({box[i] for box in there})
        for low, high in ranges:
            if low != at:
                return False
            at = high
        if at != stop:
            return False
        count *= len(ranges)
    return count == len(there)


@lru_cache(maxsize=4096)
def units_of(dim: Dim, ranges: tuple[Range, ...]) -> Range | None:
    """The logical units whose places in `dim` are `ranges`; None: no one run of units has them.

    The inverse of Dim.ranges. A dimension that is never cut has the units (0, 0).
    """
    if not dim.logical:
        return (0, 0) if ranges == ((0, dim.size),) else None
    if ranges == ((0, dim.size),):
        return 0, dim.units
    (low, high), period = ranges[0], dim.units // dim.per * dim.inner
    if low % dim.inner or high % dim.inner or high > period:
        return None
    units = low // dim.inner * dim.per, high // dim.inner * dim.per
    return units if dim.ranges(*units) == ranges else None


def joined(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    """A whole set of slices in order is all tokens of its dp group."""
    dp, _, n = tokens[0]
    return ((dp, 0, 1),) if tokens == tuple((dp, i, n) for i in range(n)) else tokens
