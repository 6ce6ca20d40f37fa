"""What the ranks of one node read of a prepared plan's files, and what they keep and hold of it.

Exact, from headers; only the seconds of the choice to share are estimated.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from .device import Device
from .forms import arena_nbytes, slots, stored_nbytes
from .once import NodePlan, plan_node
from .prepare import Prepared
from .spans import Span
from .topology import Topology
from .types import RankPlan


class FileReads(NamedTuple):
    """A rank's spans of one file. nbytes: of all; dropped: of them, between what is kept."""

    file: str
    spans: int
    nbytes: int
    smallest: int
    largest: int
    dropped: int


class RankReads(NamedTuple):
    """Bytes of a rank. alone: read by a rank that shares nothing; once: where each byte is read
    once a node; kept: in the checkpoint's form; held: in the final form, with what aligns it.
    files, spans: of a rank alone."""

    rank: int
    alone: int
    once: int
    kept: int
    held: int
    files: tuple[FileReads, ...]
    spans: tuple[Span, ...]


class NodeReads(NamedTuple):
    """node: its number, of `nodes`."""

    node: int
    nodes: int
    device: Device
    ranks: tuple[RankReads, ...]
    plan: NodePlan


def read_node(prepared: Prepared, node: int, device: Device, topology: Topology) -> NodeReads:
    """Of the ranks of one node, which are `topology.gpus` consecutive ones."""
    first = node * topology.gpus
    plans = [prepared.rank_plan(rank) for rank in range(first, first + topology.gpus)]
    plan = plan_node(plans, device=device)
    ranks = tuple(
        _rank(prepared, rank_plan, found, once)
        for rank_plan, found, once in zip(plans, plan.alone, plan.bytes_once, strict=True)
    )
    return NodeReads(node, topology.nodes, device, ranks, plan)


def _rank(prepared: Prepared, plan: RankPlan, found: tuple[Span, ...], once: int) -> RankReads:
    alone = sum(span.nbytes for span in found)
    held = arena_nbytes(slots(plan, prepared.spec.dtype))
    return RankReads(plan.rank, alone, once, stored_nbytes(plan), held, _files(found), found)


def _files(found: Iterable[Span]) -> tuple[FileReads, ...]:
    return tuple(_file(file, list(same)) for file, same in groupby(found, lambda span: span.file))


def _file(file: str, found: list[Span]) -> FileReads:
    sizes = [span.nbytes for span in found]
    kept = sum(copy.kept for span in found for copy in span.copies)
    return FileReads(file, len(found), sum(sizes), min(sizes), max(sizes), sum(sizes) - kept)
