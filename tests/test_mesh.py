"""Mesh: two views of the same ranks, the two laws, and the groups."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tpx.errors import PlanError
from tpx.mesh import AXES, GROUPS, Coords, Mesh
from tpx.plan.auto import meshes


@st.composite
def any_mesh(draw):
    return draw(st.sampled_from(list(meshes(draw(st.integers(1, 24))))))


@settings(deadline=None)
@given(any_mesh())
def test_every_group_partitions_the_world_into_equal_parts(mesh):
    for name in GROUPS:
        groups = {mesh.group(name, rank) for rank in range(mesh.world)}
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        assert {len(group) for group in groups} == {mesh.size(name)}
        assert sorted(mesh.groups(name)) == sorted(groups)
        assert all(rank in mesh.group(name, rank) for rank in range(mesh.world))


@settings(deadline=None)
@given(any_mesh())
def test_coordinates_are_a_numbering_of_both_views(mesh):
    seen = [mesh.coords(rank) for rank in range(mesh.world)]
    for rank, c in enumerate(seen):
        assert rank == c.dp * mesh.tp + c.tp == (c.edp * mesh.ep + c.ep) * mesh.etp + c.etp
    assert len(set(seen)) == mesh.world
    for axis in AXES:
        assert mesh.size(axis) == getattr(mesh, axis)
        where = {getattr(c, axis) for c in seen}
        assert where == set(range(getattr(mesh, axis)))


@settings(deadline=None)
@given(any_mesh())
def test_ranks_that_add_partial_sums_hold_the_same_tokens(mesh):
    for rank in range(mesh.world):
        assert set(mesh.group("etp", rank)) <= set(mesh.group("tp", rank))


@settings(deadline=None)
@given(any_mesh())
def test_an_expert_group_lies_in_a_tp_group_or_is_made_of_whole_ones(mesh):
    for rank in range(mesh.world):
        tp, expert = set(mesh.group("tp", rank)), set(mesh.group("expert", rank))
        assert expert <= tp or tp <= expert
        if tp <= expert:
            # one rank of each tp group, and each tp place once: gather then tp covers the group
            gather = mesh.group("gather", rank)
            assert len(gather) * mesh.tp == len(expert)
            assert len({mesh.coords(r).tp for r in gather}) == 1


@settings(deadline=None)
@given(any_mesh())
def test_a_slice_group_has_one_rank_of_each_etp_group_of_its_tp_group(mesh):
    for rank in range(mesh.world):
        members = mesh.group("slice", rank)
        assert set(members) <= set(mesh.group("tp", rank))
        assert len({mesh.group("etp", r) for r in members}) == len(members)
        assert mesh.size("slice") == mesh.tp // mesh.etp


def test_dp2_tp2_ep2_etp2():
    mesh = Mesh(dp=2, tp=2, ep=2, etp=2)
    assert mesh.coords(3) == Coords(dp=1, tp=1, edp=0, ep=1, etp=1)
    assert mesh.group("tp", 2) == (2, 3)
    assert mesh.group("ep", 1) == (1, 3)
    assert mesh.group("etp", 0) == (0, 1)
    assert mesh.group("expert", 0) == (0, 1, 2, 3)
    assert mesh.group("gather", 1) == (1, 3)
    assert mesh.group("slice", 1) == (1,)
    assert str(mesh) == "dp 2 x tp 2 x ep 2 x etp 2"
    assert str(Mesh()) == "one rank"


@pytest.mark.parametrize(
    ("sizes", "message", "hint"),
    [
        (
            {"tp": 2, "ep": 4},
            "the mesh has two views of different sizes: dp 1 x tp 2 = 2, edp 1 x ep 4 x etp 1 = 4",
            "make dp*tp equal edp*ep*etp; an axis that is left out is 1",
        ),
        (
            {"dp": 4, "etp": 4},
            "etp 4 does not divide tp 1, so ranks that add partial sums of an expert would hold "
            "different tokens",
            "use an etp that divides 1",
        ),
        (
            {"dp": 3, "tp": 2, "edp": 2, "ep": 3},
            "an expert group of ep 3 x etp 1 = 3 ranks neither lies inside a tp group of 2 nor is "
            "made of whole tp groups",
            "make one of tp and ep*etp divide the other",
        ),
        ({"tp": 0}, "mesh axis `tp` is `0`", "give `tp` a size of 1 or more"),
    ],
)
def test_a_mesh_that_breaks_a_law_is_an_error(sizes, message, hint):
    with pytest.raises(PlanError) as error:
        Mesh(**sizes)
    assert (error.value.message, error.value.hint) == (message, hint)
