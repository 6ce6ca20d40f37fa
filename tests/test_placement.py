"""Where ranks stand: the picture of the mesh, and groups that leave a machine."""

from __future__ import annotations

from tpx.cli.dry_run import mesh_lines, rank_lines
from tpx.cli.topology import topology_lines
from tpx.launch.gpus import GpuState
from tpx.launch.placement import group_places, rank_places
from tpx.mesh import Mesh
from tpx.plan.device import DEVICES
from tpx.plan.links import Links
from tpx.plan.topology import Topology


def test_of_many_ranks_the_first_machine_is_drawn_and_the_last_rank():
    mesh = Mesh(dp=8, tp=8, edp=1, ep=64)
    ranks = rank_places(64, 8, mesh, {}, None, None, True)
    lines = list(rank_lines(ranks, 8))
    assert [line.split()[0] for line in lines] == ["rank", *"01234567", "...", "63"]
    assert lines[-1].split("  ")[-1].strip() == "-"
    assert "dp 7, tp 7, ep 63" in lines[-1]


def test_the_picture_of_the_mesh_shows_where_a_machine_ends():
    assert list(mesh_lines(Mesh(dp=1, tp=16, ep=16), 8)) == [
        "dense: dp 1 x tp 16",
        "  dp 0    0  1  2  3  4  5  6  7 |  8  9 10 11 12 13 14 15",
        "experts: edp 1 x ep 16 x etp 1",
        "  edp 0    0  1  2  3  4  5  6  7 |  8  9 10 11 12 13 14 15",
    ]
    lines = list(mesh_lines(Mesh(dp=16, tp=16, edp=1, ep=256), 8))
    assert lines[9] == "  and 8 rows more"
    assert lines[11].endswith(" and 243 more")
    assert max(map(len, lines)) <= 78


def test_groups_that_leave_a_machine_are_told_once():
    h100 = DEVICES["h100"]
    found = group_places(Mesh(dp=2, tp=8, ep=16), Links(h100, Topology(2, 8)))
    assert [(g.name, g.groups, g.span.crosses, g.speed) for g in found] == [
        ("dp, gather", 8, True, 40e9),
        ("tp, slice", 2, False, 360e9),
        ("ep, expert", 1, True, 40e9),
    ]


def test_before_the_start_each_kind_of_group_has_a_line():
    mesh = Mesh(dp=2, tp=8, ep=16)
    places = group_places(mesh, Links(DEVICES["h100"], Topology(2, 8)))
    assert list(topology_lines(places, mesh)) == [
        "groups  dp, gather: r0,8 | r1,9 | r2,10 | r3,11 and 4 more, over 2 machines",
        "        tp, slice: r0-7 | r8-15, inside a machine",
        "        ep, expert: r0-15, over 2 machines",
    ]
    assert list(topology_lines([], Mesh())) == []


def test_numa_is_drawn_where_it_is_known():
    gpus = [GpuState(i, "", "", 80, 70, numa=i // 2) for i in range(4)]
    lines = list(rank_lines(rank_places(4, 4, None, {}, gpus, None, True), 4))
    assert lines[0].split() == ["rank", "machine", "GPU", "NUMA", "place", "weights", "left"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["0", "0", "0", "0"], ["1", "0", "1", "0"], ["2", "0", "2", "1"], ["3", "0", "3", "1"]
    ]  # fmt: skip
