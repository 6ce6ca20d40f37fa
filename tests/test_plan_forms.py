"""Slots of the arena: sizes in the final form, in the order of the files, aligned and apart."""

from __future__ import annotations

from itertools import pairwise

import pytest
from byte_plans import Bare
from headers import make_config, write_folder

from tpx.index import TensorMeta
from tpx.plan.forms import ALIGNMENT, Slot, arena_nbytes, joins, slots, stored_nbytes
from tpx.plan.prepare import prepare
from tpx.plan.types import Part, Shard


def shard(file: str, offset: int, dtype: str, size: int, tied_to: str | None = None) -> Shard:
    meta = TensorMeta("t", file, dtype, (size,), offset, 0)
    parts = () if tied_to or not size else (Part(meta, (((0, size),),), (0,)),)
    return Shard((size,), dtype, parts, "replicate", 1, (), tied_to=tied_to)


PLAN = Bare({
    "late": shard("b", 0, "BF16", 300),
    "tied": shard("a", 0, "BF16", 300, tied_to="late"),
    "packed": shard("a", 900, "U8", 300),
    "first": shard("a", 8, "F32", 3),
    "empty": shard("a", 0, "U8", 0),
})  # fmt: skip


@pytest.mark.parametrize(("dtype", "first", "late"), [
    ("bfloat16", 6, 600), ("float16", 6, 600), ("float32", 12, 1200),
])  # fmt: skip
def test_slots_have_the_size_of_the_final_form_in_the_order_of_the_files(dtype, first, late):
    found = slots(PLAN, dtype)
    assert list(found) == ["empty", "first", "packed", "late"]
    assert found == {
        "empty": Slot(0, 0), "first": Slot(0, first), "packed": Slot(512, 300),
        "late": Slot(1024, late),
    }  # fmt: skip
    assert arena_nbytes(found) == 1024 + late
    assert stored_nbytes(PLAN) == 600 + 300 + 12


def test_a_slot_holds_what_is_read_and_what_is_packed_from_it():
    found = slots(PLAN, "bfloat16", {"packed": 700, "late": 10})
    assert (found["packed"], found["late"]) == (Slot(512, 700), Slot(1536, 600))


def test_nothing_is_held_by_a_rank_without_parameters():
    assert arena_nbytes(slots(Bare({}), "bfloat16")) == 0


def test_slots_of_a_model_follow_each_other(tmp_path):
    config = make_config(num_hidden_layers=3, tie_word_embeddings=True)
    prepared = prepare(str(write_folder(tmp_path, config, shards=2)), "tp4-etp4", 4)
    for rank in range(4):
        plan = prepared.rank_plan(rank)
        found = slots(plan, "bfloat16")
        assert found.keys() == {name for name, s in plan.shards.items() if s.tied_to is None}
        for name, slot in found.items():
            leader, *followers = joins(name)
            assert slot.offset % (2 if name in followers else ALIGNMENT) == 0, name
        assert sum("k_proj" in name for name in found) == 6
        for leader in (name for name in found if ".q_proj." in name):
            run = [found[name] for name in joins(leader)]
            assert [a.offset + a.nbytes for a in run[:2]] == [b.offset for b in run[1:]]
        for before, after in pairwise(found.values()):
            assert 0 <= after.offset - before.offset - before.nbytes < ALIGNMENT
        assert sum(slot.nbytes for slot in found.values()) == stored_nbytes(plan)
