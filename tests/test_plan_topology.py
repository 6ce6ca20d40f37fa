"""Nodes x GPUs: read from text, and which groups cross nodes, against the mesh's own groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from tpx.errors import PlanError
from tpx.mesh import GROUPS
from tpx.plan.auto import meshes
from tpx.plan.topology import (
    Span,
    Topology,
    read_topology,
    shape_of,
    span_of,
    topology_for,
)


def test_what_is_written_is_read():
    assert read_topology("2x8") == Topology(2, 8)
    assert read_topology("128x8,inter=50") == Topology(128, 8, None, 50e9)
    assert read_topology("1x4,inter=12.5,intra=450") == Topology(1, 4, 450e9, 12.5e9)
    assert str(Topology(2, 8, 1e9)) == "2x8"


FORM = "write nodes x GPUs a node: `2x8`, or `2x8,intra=360,inter=40` with speeds in GB/s"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("3", "`--topology 3` cannot be read", FORM),
        ("0x8", "`--topology 0x8` cannot be read", FORM),
        ("2x8 ", "`--topology 2x8 ` cannot be read", FORM),
        ("2x8x2", "`--topology 2x8x2` cannot be read", FORM),
        ("2x8,speed=3", "`--topology 2x8,speed=3` has `speed=3`",
         "after nodes x GPUs come `intra=GB/s` and `inter=GB/s`, once each"),
        ("2x8,intra=1,intra=2", "`--topology 2x8,intra=1,intra=2` has `intra=2`",
         "after nodes x GPUs come `intra=GB/s` and `inter=GB/s`, once each"),
        ("2x8,intra=0", "`--topology 2x8,intra=0` has speed `0`",
         "give GB/s in plain decimal, above 0: `intra=360`"),
        ("2x8,inter=1e9", "`--topology 2x8,inter=1e9` has speed `1e9`",
         "give GB/s in plain decimal, above 0: `intra=360`"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(text, message, hint):
    with pytest.raises(PlanError) as error:
        read_topology(text)
    assert (error.value.message, error.value.hint) == (message, hint)


def test_where_nothing_is_told_a_node_has_eight():
    assert topology_for(4, None) == Topology(1, 4)
    assert topology_for(64, None) == Topology(8, 8)
    assert topology_for(12, None) == Topology(1, 12)
    with pytest.raises(PlanError) as error:
        topology_for(8, Topology(2, 8))
    assert (error.value.message, error.value.hint) == (
        "`--topology 2x8` has 16 ranks, and `--world` is 8",
        "use `--world 16`, or another topology",
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data(), nodes=st.integers(1, 6), gpus=st.integers(1, 8))
def test_a_span_is_that_of_the_meshs_own_groups(data, nodes, gpus):
    topology = Topology(nodes, gpus)
    mesh = data.draw(st.sampled_from(list(meshes(topology.world))))
    for name in GROUPS:
        groups = {mesh.group(name, rank) for rank in range(mesh.world)}
        stride, count = shape_of(mesh, name)
        assert {len(group) for group in groups} == {count}
        assert {b - a for g in groups for a, b in pairwise(g)} <= {stride}
        held = [[[r // gpus for r in g].count(node) for node in {r // gpus for r in g}]
                for g in groups]  # fmt: skip
        assert span_of(mesh, name, topology) == Span(
            count, max(map(len, held)), min(n for nodes_ in held for n in nodes_)
        )
