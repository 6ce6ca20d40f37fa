"""Nodes x GPUs: which groups of a mesh cross nodes, and how many ranks of a group share a node.

Ranks fill one node after another. A group is known by its stride and its number of ranks, so that
1024 ranks cost no more than 8.
"""

from __future__ import annotations

import functools
import re
from math import lcm
from typing import NamedTuple

from ..errors import PlanError
from ..mesh import Mesh

FORM = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})((?:,[^,]*)*)")
SPEED = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
NODE = 8  # GPUs of a node, where nothing is said: an HGX board has 8


class Topology(NamedTuple):
    """intra, inter: bytes a second that one rank sends inside a node and to another, if stated."""

    nodes: int
    gpus: int
    intra: float | None = None
    inter: float | None = None

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus}"


class Span(NamedTuple):
    """Of a set of equal groups, the widest: ranks of each, nodes it lies on, and the fewest of its
    ranks on one of them (they share that node's ports)."""

    ranks: int
    nodes: int
    per_node: int

    @property
    def crosses(self) -> bool:
        return self.nodes > 1


def read_topology(text: str) -> Topology:
    """From `NODESxGPUS[,intra=GB/s,inter=GB/s]`. Raises PlanError."""
    form = FORM.fullmatch(text)
    if form is None:
        raise PlanError(
            f"`--topology {text}` cannot be read",
            "write nodes x GPUs a node: `2x8`, or `2x8,intra=360,inter=40` with speeds in GB/s",
        )
    speeds: dict[str, float] = {}
    for pair in form[3].split(",")[1:]:
        name, _, value = pair.partition("=")
        if name not in ("intra", "inter") or name in speeds:
            raise PlanError(
                f"`--topology {text}` has `{pair}`",
                "after nodes x GPUs come `intra=GB/s` and `inter=GB/s`, once each",
            )
        if not SPEED.fullmatch(value) or float(value) == 0:
            raise PlanError(
                f"`--topology {text}` has speed `{value}`",
                "give GB/s in plain decimal, above 0: `intra=360`",
            )
        speeds[name] = float(value) * 1e9
    return Topology(int(form[1]), int(form[2]), speeds.get("intra"), speeds.get("inter"))


def topology_for(world: int, told: Topology | None, nodes_of: int = NODE) -> Topology:
    """As told, which must have `world` ranks, else nodes of `nodes_of` where they divide it."""
    if told is None:
        whole = world <= nodes_of or world % nodes_of
        return Topology(1, world) if whole else Topology(world // nodes_of, nodes_of)
    if told.world != world:
        raise PlanError(
            f"`--topology {told}` has {told.world} ranks, and `--world` is {world}",
            f"use `--world {told.world}`, or another topology",
        )
    return told


def shape_of(mesh: Mesh, group: str) -> tuple[int, int]:
    """-> (stride, ranks) of each group of that name (mesh.GROUPS)."""
    stride = {
        "dp": mesh.tp,
        "edp": mesh.expert_size,
        "ep": mesh.etp,
        "slice": mesh.etp,
        "gather": mesh.tp,
    }
    count = mesh.world if group == "world" else mesh.size(group)
    return stride.get(group, 1), count


def span_of(mesh: Mesh, group: str, topology: Topology) -> Span:
    return span(*shape_of(mesh, group), topology.world, topology.gpus)


@functools.cache
def span(stride: int, count: int, world: int, gpus: int) -> Span:
    """Groups {start, start + stride, ...} of `count` ranks, which tile `world` ranks.

    The pattern repeats after lcm(stride * count, gpus) ranks.
    """
    nodes, fewest = 1, count
    for block in range(0, min(world, lcm(stride * count, gpus)), stride * count):
        for start in range(block, block + stride):
            held: dict[int, int] = {}
            for rank in range(start, start + stride * count, stride):
                held[rank // gpus] = held.get(rank // gpus, 0) + 1
            nodes, fewest = max(nodes, len(held)), min(fewest, *held.values())
    return Span(count, nodes, fewest)
