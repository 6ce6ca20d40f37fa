"""How tokens reach their experts and come back: Local, Replicated, Gather, AllToAll.

Each has dispatch(h_TD, routing, longest) -> Dispatched, the tokens that this rank's experts are to
see, and combine(sum_PD, back) -> out_TD of the weighted sums that they gave. They know groups and
who owns an expert; not what an expert computes. Sums have a fixed order. Gradients flow, and every
rank of a tp group gets the whole one for h_TD and for the weights.

T tokens here, D hidden, K top-k, N = T*K pairs (token, k), E experts, P tokens that came here,
S tokens of this rank's slice.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..comm import Group, Groups
from ..ops.by_expert import inverse
from ..ops.route import Routing
from ..split import split


class Dispatched(NamedTuple):
    """x_PD and their routing, which names experts elsewhere too. back: what combine needs."""

    x_PD: Tensor
    routing: Routing
    back: Any


class Dispatch(Protocol):
    def dispatch(self, h_TD: Tensor, routing: Routing, longest: int) -> Dispatched: ...

    def combine(self, sum_PD: Tensor, back: Any) -> Tensor: ...


class Placement(NamedTuple):
    """Where experts lie. Entry E of both tensors, int64 [E + 1], stands for padding: on no rank.

    owner_E: the place on the ep axis. local_E: the slot on this rank, num_local if elsewhere.
    slot_E: the same in int32, -1 if elsewhere; None where all experts are here, in order, and no
    token comes from another rank.
    """

    owner_E: Tensor
    local_E: Tensor
    num_local: int
    slot_E: Tensor | None

    @property
    def nobody(self) -> int:
        """The expert that stands for padding."""
        return len(self.owner_E) - 1


def place(owner_E: tuple[int, ...], slot_E: tuple[int, ...], groups: Groups) -> Placement:
    """Looks experts up as RankPlan names them, on the groups' device."""
    here, num_local = groups["ep"].rank, owner_E.count(groups["ep"].rank)
    pairs = zip(owner_E, slot_E, strict=True)
    local = [slot if owner == here else num_local for owner, slot in pairs]
    owners = torch.tensor([*owner_E, -1], device=groups.device)
    local_E = torch.tensor([*local, num_local], device=groups.device)
    slots = None
    if groups["expert"].size > 1 or local != [*range(len(local))]:
        slots = local_E.masked_fill(local_E == num_local, -1).int()
    return Placement(owners, local_E, num_local, slots)


class Local:
    """The expert group is one rank."""

    def __init__(self, placement: Placement, groups: Groups):
        assert groups["expert"].size == 1, f"{groups['expert'].ranks=}"

    def dispatch(self, h_TD: Tensor, routing: Routing, longest: int) -> Dispatched:
        return Dispatched(h_TD, routing, None)

    def combine(self, sum_PD: Tensor, back: None) -> Tensor:
        return sum_PD


class Replicated:
    """The expert group lies inside a tp group, so its ranks see the same tokens.

    Each computes its own experts' part, and one all-reduce adds them. Shapes depend on T alone.
    """

    def __init__(self, placement: Placement, groups: Groups):
        self.expert = groups["expert"]
        assert set(self.expert.ranks) <= set(groups["tp"].ranks), f"{self.expert.ranks=}"

    def dispatch(self, h_TD: Tensor, routing: Routing, longest: int) -> Dispatched:
        h_TD = self.expert.copy(h_TD, "moe.inputs")
        weights_TK = self.expert.copy(routing.weights_TK, "moe.routing")
        return Dispatched(h_TD, Routing(routing.expert_ids_TK, weights_TK), None)

    def combine(self, sum_PD: Tensor, back: None) -> Tensor:
        return self.expert.all_reduce(sum_PD, "moe.combine")


class Gather:
    """The expert group is made of whole tp groups, which see different tokens.

    All tokens go to all ranks, `longest` rows from each; then as Replicated, but each tp group gets
    its own rows of the sum. Shapes depend on `longest` and T alone.
    """

    def __init__(self, placement: Placement, groups: Groups):
        self.nobody, self.gather, self.tp = placement.nobody, groups["gather"], groups["tp"]
        assert set(self.tp.ranks) <= set(groups["expert"].ranks), f"{groups['expert'].ranks=}"

    def dispatch(self, h_TD: Tensor, routing: Routing, longest: int) -> Dispatched:
        tokens = h_TD.shape[0]
        assert tokens <= longest, f"{tokens=} {longest=}"
        rows = (0, 0, 0, longest - tokens)
        h_TD = pad(self.tp.copy(h_TD, "moe.inputs"), rows)
        ids_TK = pad(routing.expert_ids_TK, rows, value=self.nobody)
        weights_TK = pad(self.tp.copy(routing.weights_TK, "moe.routing"), rows)
        h_ND = self.gather.all_gather(h_TD, "moe.gather_tokens")
        ids_NK = self.gather.all_gather(ids_TK, "moe.gather_ids")
        weights_NK = self.gather.all_gather(weights_TK, "moe.gather_weights")
        return Dispatched(h_ND, Routing(ids_NK, weights_NK), tokens)

    def combine(self, sum_PD: Tensor, back: int) -> Tensor:
        part_TD = self.gather.reduce_scatter(sum_PD, "moe.scatter")[:back]
        return self.tp.all_reduce(part_TD, "moe.reduce")


class AllToAll:
    """Each rank sends its tokens to the ranks of their experts, once a rank, and gets one row back.

    The ranks of a tp group hold the same tokens, so they first take a slice each, one an etp group:
    the ranks of an etp group take the same one and send it alike, each to those who hold its piece
    of every expert. Where a row arrives it is copied to its experts there; their outputs are
    weighted, added, and added over the etp group; that sum goes back. The source adds what its
    ranks sent, and the tp group gathers its slices. Ranks without a token take part.
    """

    class Back(NamedTuple):
        sent: list[int]  # rows to each rank of the ep group
        arrived: list[int]  # rows from each
        returns_SK: Tensor  # where, among the rows that come back, the sum with pair (s, k) is
        first_SK: Tensor  # whether k is the first of s that goes to that rank: it counts once
        slices: list[int]  # tokens of each slice

    def __init__(self, placement: Placement, groups: Groups):
        self.placement, self.tp, self.slice = placement, groups["tp"], groups["slice"]
        self.ep, self.etp = groups["ep"], groups["etp"]

    def dispatch(self, h_TD: Tensor, routing: Routing, longest: int) -> Dispatched:
        slices = split(h_TD.shape[0], self.slice.size)
        mine = slice(*slices[self.slice.rank])
        h_SD = self.tp.copy(h_TD, "moe.inputs")[mine]
        weights_SK = self.tp.copy(routing.weights_TK, "moe.routing")[mine]
        ids_SK = routing.expert_ids_TK[mine]

        order_N, send, returns_SK, first_SK = self.address(ids_SK)
        sent, arrived = exchange_counts(send, self.ep)
        token_M = order_N[: sum(sent)] // ids_SK.shape[1]
        x_PD = self.ep.all_to_all(h_SD[token_M], sent, arrived, "moe.tokens")
        ids_PK = self.ep.all_to_all(ids_SK[token_M], sent, arrived, "moe.ids")
        weights_PK = self.ep.all_to_all(weights_SK[token_M], sent, arrived, "moe.weights")

        lengths = [stop - start for start, stop in slices]
        back = self.Back(sent, arrived, returns_SK, first_SK, lengths)
        return Dispatched(x_PD, Routing(ids_PK, weights_PK), back)

    def combine(self, sum_PD: Tensor, back: Back) -> Tensor:
        sum_PD = self.etp.all_reduce(sum_PD, "moe.etp")
        sum_MD = self.ep.all_to_all(sum_PD, back.arrived, back.sent, "moe.return")
        out_SD = weighted_sum(sum_MD, back.returns_SK, back.first_SK.to(sum_MD.dtype))
        return self.slice.all_gather(out_SD, "moe.slices", back.slices, alike=True)

    def address(self, ids_SK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs s*K + k, those that are sent first, by destination and token; how many go to each
        rank of the ep group; and returns_SK and first_SK as in Back."""
        owner_SK = self.placement.owner_E[ids_SK]
        earlier_KK = torch.ones(2 * owner_SK.shape[1:], device=ids_SK.device).tril(-1).bool()
        same_SKK = owner_SK.unsqueeze(2) == owner_SK.unsqueeze(1)
        first_SK = ~(same_SKK & earlier_KK).any(2)
        # Pairs that are not the first of their destination sort behind all others.
        key_N = owner_SK.where(first_SK, self.ep.size).flatten()
        order_N = key_N.argsort(stable=True)
        count = key_N.new_zeros(self.ep.size + 1).scatter_add_(0, key_N, torch.ones_like(key_N))
        returns_SK = inverse(order_N).view_as(ids_SK)
        returns_SK = returns_SK.where(first_SK, returns_SK[:, :1])
        return order_N, count[: self.ep.size], returns_SK, first_SK


def exchange_counts(send: Tensor, ep: Group) -> tuple[list[int], list[int]]:
    """Rows sent to and arriving from each rank of the group, on the host."""
    each = [1] * ep.size
    arrived = ep.all_to_all(send, each, each, "moe.counts")
    sent, came = torch.stack([send, arrived]).tolist()
    return sent, came


def weighted_sum(y_RD: Tensor, position_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """out_TD: row t is the sum over k of weights_TK[t, k] * y_RD[position_TK[t, k]]."""
    return torch.bmm(weights_TK.unsqueeze(1), y_RD[position_TK]).squeeze(1)
