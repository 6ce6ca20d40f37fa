"""Tiling on resolved values: what no plan can break, broken by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from headers import layout_of, make_config, write_folder

from tpx.errors import CheckpointError, PlanError
from tpx.families.layout import Dim, Layout
from tpx.index import CheckpointIndex
from tpx.plan.checkpoint import check_checkpoint
from tpx.plan.cuts import assign
from tpx.plan.find import shipped_plans
from tpx.plan.held import Held, hold
from tpx.plan.load import load_plan
from tpx.plan.tiling import check_blocks, check_tiling
from tpx.plan.values import tiles, units_of

LAYOUT = layout_of(make_config())


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return CheckpointIndex.open(write_folder(tmp_path_factory.mktemp("headers")))


def held_by(index, name) -> Held:
    plan = load_plan(shipped_plans("gpt_oss")[name], f"{name}.yaml")
    return hold(plan, LAYOUT, index, assign(plan, LAYOUT))


TILES = {
    "gap": (((0, 60), (0, 64)), "leave a gap at 60 of 131"),
    "overlap": (((0, 70), (0, 64)), "overlap at 66 of 131"),
    "held by one rank, and by all": (((0, 131), (0, 64)), "overlap at 66 of 131"),
}


@pytest.mark.parametrize("case", TILES)
def test_the_ranks_shards_tile_each_parameter(index, case):
    box, phrase = TILES[case]
    held = held_by(index, "tp2")
    assert check_tiling(held) == len(LAYOUT.parameters)
    name, shards = "model.embed_tokens.weight", [dict(mine) for mine in held.shards]
    shards[0][name] = replace(shards[0][name], ranges=tuple((r,) for r in box))
    with pytest.raises(PlanError) as error:
        check_tiling(held._replace(shards=shards))
    assert (error.value.code, error.value.message) == (
        "P204",
        f"plan `tp2.yaml`, line 7: the ranks' shards of `model.embed_tokens.weight` {phrase}",
    )


def test_cuts_inside_a_block_are_refused(index):
    held = held_by(index, "tp2-etp2")
    cuts = [dict(mine) for mine in held.cuts]
    cuts[0]["I"] = cuts[0]["I"]._replace(stop=48)
    with pytest.raises(PlanError) as error:
        check_blocks(held.plan, LAYOUT, cuts)
    assert (error.value.code, error.value.message) == (
        "P203", "plan `tp2-etp2.yaml`: a cut of intermediate_size at 48 falls inside a block of 32"
    )  # fmt: skip


def test_gate_and_up_in_two_copies_are_cut_alike(index):
    held = held_by(index, "tp2-etp2")
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    shards = [dict(mine) for mine in held.shards]
    shards[1][name] = replace(shards[1][name], ranges=(((0, 8),), ((128, 191),)))
    with pytest.raises(PlanError) as error:
        check_tiling(held._replace(shards=shards))
    assert (error.value.code, error.value.message) == (
        "P205",
        f"plan `tp2-etp2.yaml`, line 12: ranges `[(128, 191)]` of `{name}` are not one run of `I`",
    )


def test_pieces_of_a_tensor_that_overlap_are_refused(index):
    """As a fused QKV whose keys begin too early would."""
    name = "model.layers.0.self_attn.q_proj.weight"
    query = LAYOUT.parameters[name]
    (source,) = query.sources
    doubled = replace(query, sources=(source, source))
    layout = Layout(LAYOUT.dims, LAYOUT.parameters | {name: doubled}, LAYOUT.together)
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(layout, index)
    assert (error.value.code, error.value.message) == (
        "P108", f"the tensors of parameter `{name}` leave a gap or overlap"
    )  # fmt: skip


def test_ranges_and_units_are_each_others_inverse():
    for dim in (
        Dim("Q", 8, inner=16),
        Dim("I", 96, inner=2),
        Dim("I", 96, outer=2),
        Dim("I", 96, per=32),
    ):
        for start in range(0, dim.units + 1, dim.per):
            for stop in range(start, dim.units + 1, dim.per):
                assert units_of(dim, dim.ranges(start, stop)) == (start, stop)
    assert units_of(Dim("I", 96, outer=2), ((0, 48), (96, 140))) is None
    assert units_of(Dim("I", 96, inner=2), ((0, 3),)) is None
    assert units_of(Dim("", 64), ((0, 32),)) is None


def test_boxes_tile_where_each_element_is_in_one_of_them():
    full = ((0, 4), (0, 6))
    grid = [((a, a + 2), (b, b + 3)) for a in (0, 2) for b in (0, 3)]
    assert tiles(grid, full)
    assert tiles([*grid, ((4, 4), (0, 6))], full)
    assert tiles([full], full)
    assert not tiles(grid[:3], full)
    assert not tiles([*grid, grid[0]], full)
    assert not tiles([*grid[:3], ((2, 4), (2, 6))], full)
    assert not tiles([((0, 4), (0, 3))], full)
