"""Where each rank stands: machine, GPU, place on the mesh; and which groups leave a machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..mesh import AXES, Coords, Mesh
from ..plan.links import Links
from ..plan.topology import Span, span_of
from .gpus import GpuState
from .needs import Need

SHOWN = (*AXES, "expert", "slice", "gather")


class RankPlace(NamedTuple):
    """gpu: its number on that machine, numa: the node of memory it is next to; None where there is
    none or it is not known. coords: None without a plan. need: of this rank, left: bytes of its
    device beside it, where both are known."""

    rank: int
    node: int
    local_rank: int
    gpu: int | None
    numa: int | None
    coords: Coords | None
    need: Need | None
    left: int | None


class GroupPlace(NamedTuple):
    """Groups of one name. speed: bytes a second that a rank sends in it, as stated."""

    name: str
    groups: int
    span: Span
    speed: float


def rank_places(
    world: int,
    nproc: int,
    mesh: Mesh | None,
    needs: dict[int, Need],
    gpus: Sequence[GpuState] | None,
    memory: int | None,
    has_gpus: bool,
) -> list[RankPlace]:
    """gpus: of each local rank, alike on every machine; None: not known. memory: bytes of one
    device where its state is not known."""
    found = []
    for rank in range(world):
        node, local = divmod(rank, nproc)
        gpu = gpus[local] if gpus is not None and local < len(gpus) else None
        number = (gpu.number if gpu else local) if has_gpus else None
        need, room = needs.get(rank), gpu.free if gpu else memory
        left = room - need.total if room is not None and need is not None else None
        coords = mesh.coords(rank) if mesh is not None else None
        numa = gpu.numa if gpu else None
        found.append(RankPlace(rank, node, local, number, numa, coords, need, left))
    return found


def group_places(mesh: Mesh, links: Links) -> list[GroupPlace]:
    """Of each kind of group that has more than one rank, each set of ranks once."""
    found: dict[tuple[tuple[int, ...], ...], GroupPlace] = {}
    for name in SHOWN:
        size = mesh.size(name)
        if size < 2:
            continue
        span = span_of(mesh, name, links.topology)
        same = tuple(mesh.groups(name))
        known = found.get(same)
        names = name if known is None else f"{known.name}, {name}"
        found[same] = GroupPlace(names, mesh.world // size, span, links.speed(span))
    return list(found.values())
