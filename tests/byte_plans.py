"""Small RankPlans of any shape with the files they read, and spans applied to bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from tpx.index import DTYPE_BITS, TensorMeta
from tpx.plan.spans import Copy, Span
from tpx.plan.types import Part, Shard

UNFILLED = 0xEE  # what is in a shard where no part goes
Files = dict[str, bytes]


class Bare(NamedTuple):
    """As much of a RankPlan as reading needs."""

    shards: dict[str, Shard]


class Drawn(NamedTuple):
    """plans, expected: by rank, a RankPlan and the bytes of its shards."""

    plans: list[Bare]
    files: Files
    expected: list[dict[str, bytes]]
    tensors: list[TensorMeta]


def item(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8


def shards_of(plan: Bare) -> dict[str, bytearray]:
    return {n: bytearray([UNFILLED]) * (s.numel * item(s.dtype)) for n, s in plan.shards.items()}


def apply(copies: Iterable[Copy], data: bytes, shards: dict[str, bytearray]) -> None:
    """data: what was read, where the copies' sources count from."""
    for copy in copies:
        assert copy.kept > 0
        assert (copy.rows == 1) == (copy.source_step == copy.target_step == 0)
        for row in range(copy.rows):
            start = copy.source + row * copy.source_step
            to = copy.target + row * copy.target_step
            assert start >= 0
            assert start + copy.nbytes <= len(data)
            shards[copy.parameter][to : to + copy.nbytes] = data[start : start + copy.nbytes]


def read(spans: Iterable[Span], plan: Bare, files: Files) -> dict[str, bytes]:
    """The shards of a rank that reads these spans."""
    found = shards_of(plan)
    for span in spans:
        assert 0 <= span.offset < span.end <= len(files[span.file])
        apply(span.copies, files[span.file][span.offset : span.end], found)
    return {name: bytes(data) for name, data in found.items()}


def ranges_of(size: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """All of a dimension, or up to three ranges of it that ascend, touch or are empty."""
    some = st.lists(st.integers(0, size), min_size=2, max_size=6).map(sorted)
    return st.just(((0, size),)) | some.map(lambda p: tuple(zip(p[::2], p[1::2], strict=False)))


@st.composite
def drawn(draw: st.DrawFn, ranks: int = 1, longest: int = 6) -> Drawn:
    """Tensors in two files; of each, a rank takes any ranges, into a shard that has dimensions
    before the tensor's, and margins that no part fills. longest: of a last dimension."""
    files = {"a": b"head", "b": b"?" * draw(st.integers(0, 9))}
    found = Drawn([Bare({}) for _ in range(ranks)], files, [{} for _ in range(ranks)], [])
    for number in range(draw(st.integers(1, 4))):
        file, dtype = draw(st.sampled_from("ab")), draw(st.sampled_from(["U8", "BF16", "F32"]))
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        shape += (draw(st.integers(1, longest)),) * draw(st.booleans())
        values = np.random.default_rng(number).integers(0, 256, (*shape, item(dtype)), np.uint8)
        meta = TensorMeta(f"t{number}", file, dtype, shape, len(files[file]), values.nbytes)
        files[file] += values.tobytes()
        found.tensors.append(meta)
        for plan, expected in zip(found.plans, found.expected, strict=True):
            index = tuple(draw(ranges_of(size)) for size in shape)
            shard, filled = _shard(draw, meta, values, index)
            plan.shards[f"p{number}"] = shard
            expected[f"p{number}"] = filled.tobytes()
    return found


def _shard(
    draw: st.DrawFn,
    meta: TensorMeta,
    values: np.ndarray,
    index: tuple[tuple[tuple[int, int], ...], ...],
) -> tuple[Shard, np.ndarray]:
    rows = [np.array([i for r in ranges for i in range(*r)], int) for ranges in index]
    chosen = values[np.ix_(*rows, np.arange(values.shape[-1]))]
    lead = tuple(draw(st.lists(st.integers(0, 2), max_size=2)))
    none, one = st.just((0, 0)), st.tuples(st.integers(0, 1), st.integers(0, 1))
    margins = [draw(none | one) for _ in index]
    sizes = zip(margins, chosen.shape, strict=False)
    shape = (*(at + 1 for at in lead), *(before + n + after for (before, after), n in sizes))
    filled = np.full((*shape, values.shape[-1]), UNFILLED, np.uint8)
    inside = [slice(m[0], m[0] + n) for m, n in zip(margins, chosen.shape, strict=False)]
    filled[(*lead, *inside)] = chosen
    part = Part(meta, index, (*lead, *(before for before, _ in margins)))
    return Shard(shape, meta.dtype, (part,), "replicate", 1, ()), filled
