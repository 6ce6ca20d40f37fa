"""read/: which bytes go straight to their places, which are moved, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_plans import Bare
from hypothesis import given, settings, strategies as st
from make_checkpoint import make_checkpoint
from reading import one_shard
from tiny import tiny_config

from tpx.index import TensorMeta
from tpx.plan.forms import joins
from tpx.plan.prepare import prepare
from tpx.plan.spans import Copy, Span, cut, spans
from tpx.plan.types import Part, Shard
from tpx.read import Arena, move
from tpx.read.batches import batches
from tpx.read.device import runs_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("copies") / "small", tiny_config())


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    nbytes=st.integers(1, 40),
    begins=st.tuples(st.integers(0, 17), st.integers(0, 17)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    offsets=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_strided_bytes_are_moved_at_any_alignment(rows, nbytes, begins, more, offsets):
    steps = [nbytes + m if rows > 1 else 0 for m in more]
    copy = Copy("p", begins[0], begins[1], nbytes, rows, *steps)
    source, target = (
        torch.randint(256, (offset + begin + rows * (nbytes + m),), dtype=torch.uint8)[offset:]
        for offset, begin, m in zip(offsets, begins, more, strict=True)
    )
    expected = target.clone()
    for row in range(rows):
        at, to = begins[0] + row * steps[0], begins[1] + row * steps[1]
        expected[to : to + nbytes] = source[at : at + nbytes]
    move(copy, source, target)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_copy_beyond_its_memory_is_noticed(end):
    """Even where the storage goes on."""
    data = {"source": torch.zeros(100, dtype=torch.uint8), "target": torch.zeros(100)}
    data["target"] = torch.zeros(100, dtype=torch.uint8)
    data[end] = data[end][:50]
    with pytest.raises(AssertionError):
        move(Copy("p", 8, 8, 48, 1, 0, 0), **data)


def test_what_is_kept_as_it_is_needs_no_buffer(small):
    """A rank that holds all in the checkpoint's dtypes; none of its reads has bytes to drop."""
    prepared = prepare(str(small), "tp1", 1)
    plan = prepared.rank_plan(0)
    reads = [read for span in spans(plan) for read in cut(span, 4096)]
    direct, cast = Arena(plan, torch.bfloat16, CPU), Arena(plan, torch.float32, CPU)
    for read_ in reads:
        places = direct.places(read_)
        assert places is not None
        assert sum(nbytes for _, nbytes in places) == read_.nbytes
    assert {cast.places(read_) is None for read_ in reads} == {True, False}  # packed ones are


def test_bytes_to_drop_or_to_spread_go_through_a_buffer():
    arena = Arena(Bare(one_shard((4, 8), "U8")), torch.bfloat16, CPU)
    assert arena.places(Span("file", 0, 16, (Copy("p", 0, 0, 16, 1, 0, 0),))) == [(0, 16)]
    assert arena.places(Span("file", 0, 17, (Copy("p", 0, 0, 16, 1, 0, 0),))) is None
    assert arena.places(Span("file", 0, 17, (Copy("p", 1, 0, 16, 1, 0, 0),))) is None
    assert arena.places(Span("file", 0, 16, (Copy("p", 0, 0, 4, 4, 4, 8),))) is None
    hole = (Copy("p", 0, 0, 4, 1, 0, 0), Copy("p", 8, 8, 8, 1, 0, 0))
    assert arena.places(Span("file", 0, 16, hole)) is None


def test_reads_that_touch_in_the_arena_are_copied_to_a_gpu_as_one():
    """Rows 2 to 4 of each of 50 experts: as many reads, and as many copies as there are buffers."""
    meta = TensorMeta("t", "file", "U8", (50, 8, 1000), 0, 400_000)
    part = Part(meta, (((0, 50),), ((2, 4),), ((0, 1000),)), (0, 0, 0))
    plan = Bare({"p": Shard((50, 2, 1000), "U8", (part,), "expert", 1, ())})
    found, arena = spans(plan, 0), Arena(plan, torch.bfloat16, CPU)
    assert len(found) == 50
    made = list(batches(found, 40960))
    assert [len(batch.laid) for batch in made] == [20, 20, 10]
    assert [runs_of(batch.laid, arena) for batch in made] == [
        [(0, 0, 40_000)], [(0, 40_000, 40_000)], [(0, 80_000, 20_000)],
    ]  # fmt: skip
    joined = spans(plan, 6000)
    assert len(joined) == 1
    assert runs_of(next(batches(joined, 1 << 20)).laid, arena) is None


def test_the_arena_is_one_allocation_of_aligned_slots(small):
    plan = prepare(str(small), "tp1", 1).rank_plan(0)
    arena = Arena(plan, torch.float32, CPU)
    assert {arena.view(name).untyped_storage().data_ptr() for name in arena.slots} == {
        arena.data.data_ptr()
    }
    first = {joins(name)[0] for name in arena.slots}  # the others follow it without a gap
    assert all(arena.slots[name].offset % 512 == 0 for name in first)
    assert all(arena.slot(name).data_ptr() % 64 == 0 for name in first)
