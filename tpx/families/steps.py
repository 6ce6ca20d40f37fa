"""The collectives of one forward pass, as planned: what a run is tested against.

Knows the four dispatches of a Mixture-of-Experts layer by name and what each sends; knows no
family, no tensor and no process group.
"""

from __future__ import annotations

from math import comb
from typing import Literal, NamedTuple

from ..mesh import Mesh

DispatchName = Literal["local", "replicated", "gather", "all_to_all"]
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ID_BYTES = 8  # expert ids and row counts travel as int64


class Cut(NamedTuple):
    """This rank's units [start, stop) of a logical dimension; axis None: it is not split."""

    axis: str | None
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Collective(NamedTuple):
    """One collective of a forward pass.

    name: as comm.py records it. op: all_reduce, all_gather, reduce_scatter or all_to_all. group:
    one of mesh.GROUPS. elements: what one rank puts in for each token of its own (for "head": for
    each row of logits), before any padding; all-to-all sends what routing decides, so uniform
    routing is assumed. itemsize: bytes an element. per_layer: once in each layer, else once in a
    forward. per_token False: `elements` does not grow with the tokens.
    """

    name: str
    op: str
    group: str
    elements: float
    itemsize: int
    per_layer: bool
    per_token: bool = True

    @property
    def nbytes(self) -> float:
        return self.elements * self.itemsize


class MoE(NamedTuple):
    """What the traffic of one Mixture-of-Experts layer depends on."""

    hidden: int
    top_k: int
    experts: int
    itemsize: int


def moe_collectives(mesh: Mesh, moe: MoE, dispatch: DispatchName) -> tuple[Collective, ...]:
    """The collectives of one MoE layer, in order; groups of one rank have none."""
    steps = {
        "local": _local,
        "replicated": _replicated,
        "gather": _gather,
        "all_to_all": _all_to_all,
    }[dispatch](mesh, moe)
    return with_peers(mesh, steps)


def with_peers(mesh: Mesh, steps: tuple[Collective, ...]) -> tuple[Collective, ...]:
    """Those whose group has more than one rank."""
    return tuple(step for step in steps if mesh.size(step.group) > 1)


def ranks_reached(moe: MoE, ep: int) -> float:
    """Ranks of an ep group that a token's top_k experts lie on, on average over all choices.

    A rank with e of E experts is missed by C(E - e, K) of the C(E, K) choices.
    """
    missed = comb(moe.experts - moe.experts // ep, moe.top_k) / comb(moe.experts, moe.top_k)
    return ep * (1 - missed)


def _local(mesh: Mesh, moe: MoE) -> tuple[Collective, ...]:
    return ()


def _replicated(mesh: Mesh, moe: MoE) -> tuple[Collective, ...]:
    return (Collective("moe.combine", "all_reduce", "expert", moe.hidden, moe.itemsize, True),)


def _gather(mesh: Mesh, moe: MoE) -> tuple[Collective, ...]:
    peers = mesh.size("gather")
    return (
        Collective("moe.gather_tokens", "all_gather", "gather", moe.hidden, moe.itemsize, True),
        Collective("moe.gather_ids", "all_gather", "gather", moe.top_k, ID_BYTES, True),
        Collective("moe.gather_weights", "all_gather", "gather", moe.top_k, moe.itemsize, True),
        # A rank puts in a partial sum for the tokens of all peers, and gets its own back.
        Collective(
            "moe.scatter", "reduce_scatter", "gather", peers * moe.hidden, moe.itemsize, True
        ),
        Collective("moe.reduce", "all_reduce", "tp", moe.hidden, moe.itemsize, True),
    )


def _all_to_all(mesh: Mesh, moe: MoE) -> tuple[Collective, ...]:
    # A tp group's ranks share their tokens: each etp group of it sends one slice.
    share = 1 / mesh.size("slice")
    rows = share * ranks_reached(moe, mesh.ep)
    item = moe.itemsize
    return (
        Collective("moe.counts", "all_to_all", "ep", mesh.ep, ID_BYTES, True, per_token=False),
        Collective("moe.tokens", "all_to_all", "ep", rows * moe.hidden, item, True),
        Collective("moe.ids", "all_to_all", "ep", rows * moe.top_k, ID_BYTES, True),
        Collective("moe.weights", "all_to_all", "ep", rows * moe.top_k, item, True),
        Collective("moe.etp", "all_reduce", "etp", rows * moe.hidden, item, True),
        Collective("moe.return", "all_to_all", "ep", rows * moe.hidden, item, True),
        Collective("moe.slices", "all_gather", "slice", share * moe.hidden, item, True),
    )
