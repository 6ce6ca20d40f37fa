"""Groups that a forward can be given in the place of comm.Groups: calls are noted, nothing is sent.

What the other ranks would send is drawn at random, their tokens routed to experts as likely. Knows
the order of all-to-all's exchanges (counts, then ids), and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .mesh import GROUPS, Mesh
from .plan.types import RankPlan
from .record import Record
from .split import split


class Arrival(NamedTuple):
    """What routing decided in one layer: rows that this rank sends, and that arrive."""

    sent: int
    arrived: int


class Peers:
    """What other ranks send: values drawn at random, and tokens whose experts are as likely.

    mine: this rank's slice of its tokens. drawn: of each exchange of counts, the expert ids of the
    rows that each rank of the ep group sends here; of this rank itself none.
    """

    def __init__(self, rank_plan: RankPlan, tokens: int, generator: torch.Generator):
        mesh, spec = rank_plan.mesh, rank_plan.spec
        self.experts, self.top_k = spec.num_local_experts, spec.num_experts_per_tok
        self.generator = generator
        self.owner_E = torch.tensor(rank_plan.owner_E)
        self.here = mesh.coords(rank_plan.rank).ep
        slices = [slice(*ends) for ends in split(tokens, mesh.size("slice"))]
        self.mine = slices[place_in("slice", mesh, rank_plan.rank)]
        ranks = mesh.group("ep", rank_plan.rank)
        theirs = [slices[place_in("slice", mesh, rank)] for rank in ranks]
        self.tokens = [one.stop - one.start for one in theirs]
        self.drawn: list[list[Tensor]] = []

    def values(self, x: Tensor, rows: int) -> Tensor:
        """Rows like those of x; whole numbers are the experts of a token."""
        if x.is_floating_point():
            return torch.randn(rows, *x.shape[1:], generator=self.generator).to(x.dtype)
        return self.route(rows)

    def route(self, rows: int) -> Tensor:
        """[rows, K] different experts."""
        likely = torch.rand(rows, self.experts, generator=self.generator)
        return likely.topk(self.top_k).indices

    def counts(self, own: int) -> Tensor:
        """Rows that come from each rank of the ep group, `own` from this rank itself."""
        routed = [self.route(tokens) for tokens in self.tokens]
        reach = [ids[(self.owner_E[ids] == self.here).any(1)] for ids in routed]
        reach[self.here] = reach[self.here][:0]
        self.drawn.append(reach)
        lengths = [len(ids) for ids in reach]
        lengths[self.here] = own
        return torch.tensor(lengths)

    def arrival(self, ids_TK: Tensor, came: Sequence[Tensor]) -> Arrival:
        """One row a (token of this rank's slice, destination rank), and what came from peers."""
        owners = [set(self.owner_E[ids].tolist()) for ids in ids_TK[self.mine]]
        own = sum(self.here in found for found in owners)
        return Arrival(sum(map(len, owners)), own + sum(map(len, came)))


def place_in(group: str, mesh: Mesh, rank: int) -> int:
    return mesh.group(group, rank).index(rank)


class RecordingGroup:
    """What a forward calls of comm.Group: notes each call, and answers for the peers."""

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int, peers: Peers):
        self.name, self.ranks = name, ranks
        self.rank, self.size = ranks.index(rank), len(ranks)
        self.peers = peers
        self.records: list[Record] = []

    def copy(self, x: Tensor, name: str = "copy") -> Tensor:
        return x

    def all_reduce(self, x: Tensor, name: str) -> Tensor:
        return x if self.alone("all_reduce", x, name) else x + self.peers.values(x, len(x))

    def all_gather(
        self, x: Tensor, name: str, sizes: Sequence[int] | None = None, *, alike: bool = False
    ) -> Tensor:
        if self.alone("all_gather", x, name):
            return x
        sizes = sizes or [len(x)] * self.size
        assert sizes[self.rank] == len(x), f"{x.shape=} {sizes=} {self.rank=}"
        return torch.cat(self.parts(x, sizes))

    def reduce_scatter(self, x: Tensor, name: str) -> Tensor:
        if self.alone("reduce_scatter", x, name):
            return x
        assert len(x) % self.size == 0, f"{x.shape=} {self.size=}"
        own = x.chunk(self.size)[self.rank] if len(x) else x
        return own + self.peers.values(own, len(own))

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Tensor:
        assert len(x) == sum(send), f"{x.shape=} {send=}"
        if self.alone("all_to_all", x, name):
            return x
        own = torch.split(x, send)[self.rank]
        if x.is_floating_point():
            return torch.cat(self.parts(own, receive))
        if x.dim() == 1:
            return self.peers.counts(int(own))
        ids = [*self.peers.drawn[-1]]
        ids[self.rank] = own
        assert [len(one) for one in ids] == receive, f"{receive=}"
        return torch.cat(ids)

    def parts(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        return [
            own if place == self.rank else self.peers.values(own, size)
            for place, size in enumerate(sizes)
        ]

    def alone(self, op: str, x: Tensor, name: str) -> bool:
        """Whether there is no peer; else it notes the call, as comm.Group does."""
        if self.size > 1:
            self.records.append(Record.of(name, op, self.name, x))
        return self.size == 1


class RecordingGroups:
    """In the place of comm.Groups; records: of all groups, in the order of the calls."""

    def __init__(self, mesh: Mesh, rank: int, peers: Peers):
        self.mesh, self.rank, self.device = mesh, rank, torch.device("cpu")
        self.groups = {
            name: RecordingGroup(name, mesh.group(name, rank), rank, peers) for name in GROUPS
        }
        self.none = RecordingGroup("none", (rank,), rank, peers)
        self.records: list[Record] = []
        for group in self.groups.values():
            group.records = self.records

    def __getitem__(self, name: str) -> RecordingGroup:
        return self.groups[name]
