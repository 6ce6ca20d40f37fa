"""The byte plan: its spans and copies against numpy's slicing, and what reads are cut from them."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from byte_plans import Bare, drawn, item, read
from headers import make_config, write_folder
from hypothesis import given, settings, strategies as st

from tpx.index import TensorMeta
from tpx.plan.forms import stored_nbytes
from tpx.plan.prepare import prepare
from tpx.plan.spans import GAP, Copy, Span, Window, clipped, cut, spans
from tpx.plan.types import Part, Shard

GAPS = st.sampled_from([0, 1, 7, 1 << 20])


@settings(max_examples=60, deadline=None)
@given(drawn(), GAPS)
def test_any_ranges_land_where_numpy_puts_them(case, gap):
    [plan], files, [expected], _ = case
    found = spans(plan, gap)
    assert read(found, plan, files) == expected
    kept = sum(copy.kept for span in found for copy in span.copies)
    parts = [part for shard in plan.shards.values() for part in shard.parts]
    assert kept == sum(prod(part.shape) * item(part.meta.dtype) for part in parts)


@settings(max_examples=40, deadline=None)
@given(drawn(), GAPS)
def test_spans_are_sorted_disjoint_aligned_and_no_wider_than_their_copies(case, gap):
    [plan], _, _, _ = case
    found = spans(plan, gap)
    for before, after in pairwise(found):
        assert before.file < after.file or before.end <= after.offset
    for span in found:
        covered = np.zeros(span.nbytes, bool)
        assert [c.source for c in span.copies] == sorted(c.source for c in span.copies)
        for copy in span.copies:
            size = item(plan.shards[copy.parameter].dtype)
            assert copy.source % size == copy.source_step % size == copy.nbytes % size == 0
            for row in range(copy.rows):
                start = copy.source + row * copy.source_step
                covered[start : start + copy.nbytes] = True
        assert covered[0]
        assert covered[-1]
        assert max(map(len, bytes(covered).split(b"\1"))) <= gap


@settings(max_examples=60, deadline=None)
@given(drawn(), GAPS, st.lists(st.integers(0, 10**6), max_size=12))
def test_windows_between_elements_keep_every_byte_once(case, gap, points):
    [plan], files, [expected], tensors = case
    found = spans(plan, gap)
    edges = {(file, edge) for file, data in files.items() for edge in (0, len(data))}
    for point in points:  # the start of some element
        meta = tensors[point % len(tensors)]
        size = item(meta.dtype)
        edges.add((meta.file, meta.offset + point % (meta.nbytes // size) * size))
    pairs = pairwise(sorted(edges))
    windows = [Window(file, a, b - a) for (file, a), (other, b) in pairs if other == file]
    reads = [Span(*w, copies) for w, copies in zip(windows, clipped(found, windows), strict=True)]
    assert read((each for each in reads if each.nbytes), plan, files) == expected
    for each in reads:
        assert [c.source for c in each.copies] == sorted(c.source for c in each.copies)
    kept = (copy.kept for span in found for copy in span.copies)
    assert sum(copy.kept for each in reads for copy in each.copies) == sum(kept)


def long_rows(rows: int, length: int, low: int, high: int, dtype: str) -> tuple[Bare, bytes]:
    data = (
        np.random.default_rng(rows)
        .integers(0, 256, rows * length * item(dtype), np.uint8)
        .tobytes()
    )
    meta = TensorMeta("t", "a", dtype, (rows, length), 0, len(data))
    part = Part(meta, (((0, rows),), ((low, high),)), (0, 0))
    return Bare({"p": Shard((rows, high - low), dtype, (part,), "replicate", 1, ())}), data


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 900),
    st.tuples(st.integers(0, 899), st.integers(1, 900)),
    st.sampled_from(["U8", "BF16", "F32"]),
    st.integers(1, 3),
    GAPS,
)
def test_reads_hold_the_span_in_pieces_of_at_most_so_many_bytes(
    rows, length, piece, dtype, pages, gap
):
    low = min(piece[0], length - 1)
    plan, data = long_rows(rows, length, low, min(length, low + piece[1]), dtype)
    size, most = item(dtype), pages * 4096
    found = spans(plan, gap)
    reads = [each for span in found for each in cut(span, most)]
    assert read(reads, plan, {"a": data}) == read(found, plan, {"a": data})
    assert sum(each.nbytes for each in reads) == sum(span.nbytes for span in found)
    for each in reads:
        assert 0 < each.nbytes <= most
        assert all(c.source % size == c.nbytes % size == c.target % size == 0 for c in each.copies)


def test_a_slice_of_many_rows_is_one_copy():
    """12 of 90 blocks of down_proj of 128 experts: 368,640 rows."""
    meta = TensorMeta("t", "a", "U8", (128, 2880, 90, 16), 1000, 128 * 2880 * 1440)
    part = Part(meta, (((0, 128),), ((0, 2880),), ((24, 35),), ((0, 16),)), (0, 0, 0, 0))
    shard = Shard((128, 2880, 11, 16), "U8", (part,), "expert", 1, ())
    [span] = spans(Bare({"p": shard}))
    assert span.copies == (Copy("p", 0, 0, 176, 368_640, 1440, 176),)
    assert (span.offset, span.nbytes) == (1000 + 384, 368_639 * 1440 + 176)


def test_ranges_that_touch_are_one():
    meta = TensorMeta("t", "a", "BF16", (4, 9), 0, 72)
    part = Part(meta, (((0, 4),), ((1, 3), (3, 3), (3, 6))), (0, 0))
    [span] = spans(Bare({"p": Shard((4, 5), "BF16", (part,), "colwise", 1, ())}))
    assert span.copies == (Copy("p", 0, 0, 10, 4, 18, 10),)


def test_reads_keep_the_order_of_the_file_where_copies_interleave():
    """Gate and up one after the other in each row: a read begins inside a row of the first."""
    span = Span("a", 0, 24576, (Copy("p", 0, 0, 1024, 12, 2048, 2048),
                                Copy("q", 1024, 0, 1024, 12, 2048, 2048)))  # fmt: skip
    [copies] = clipped([span], [Window("a", 2560, 5000)])
    assert [(c.parameter, c.source, c.nbytes, c.rows) for c in copies] == [
        ("p", 0, 512, 1), ("q", 512, 1024, 2), ("p", 1536, 1024, 2), ("q", 4608, 392, 1)
    ]  # fmt: skip


def test_rows_far_apart_are_read_alone_and_tied_parameters_are_not_read():
    step = 2 * GAP
    meta = TensorMeta("t", "a", "BF16", (3, step), 10, 6 * step)
    part = Part(meta, (((0, 3),), ((4, 8),)), (0, 0))
    shard = Shard((3, 4), "BF16", (part,), "colwise", 1, ())
    tied = Shard((3, 4), "BF16", (), "colwise", 1, (), tied_to="p")
    assert spans(Bare({"p": shard, "q": tied})) == [
        Span("a", 18 + row * 2 * step, 8, (Copy("p", 0, 8 * row, 8, 1, 0, 0),)) for row in range(3)
    ]


@pytest.mark.parametrize(("shift", "count"), [(2, 1), (3, 2)])
def test_a_tensor_at_an_odd_distance_is_a_span_of_its_own(shift, count):
    """3 bytes, then a bfloat16 tensor: joined, a read of an even number would cut an element."""
    first = TensorMeta("u", "a", "U8", (shift,), 0, shift)
    second = TensorMeta("b", "a", "BF16", (2,), shift, 4)
    shards = {
        "u": Shard((shift,), "U8", (Part(first, (((0, shift),),), (0,)),), "replicate", 1, ()),
        "b": Shard((2,), "BF16", (Part(second, (((0, 2),),), (0,)),), "replicate", 1, ()),
    }
    assert len(spans(Bare(shards))) == count


def test_the_whole_model_is_one_span_a_file(tmp_path):
    prepared = prepare(str(write_folder(tmp_path, make_config(), shards=3)), "tp1", 1)
    plan = prepared.rank_plan(0)
    found = spans(plan)
    assert [span.file for span in found] == sorted(prepared.index.files)
    assert sum(span.nbytes for span in found) == stored_nbytes(plan)
