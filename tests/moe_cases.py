"""Tokens, experts and routings that try a dispatch, what is right, and what a rank gets.

What a token carries is computed from its global index, so a row that goes astray is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed

from tpx.comm import Groups
from tpx.mesh import Mesh
from tpx.moe.dispatch import AllToAll, Dispatch, Gather, Local, Replicated, place, weighted_sum
from tpx.ops.by_expert import inverse, sort_by_expert
from tpx.ops.grouped_mm import grouped_mm
from tpx.ops.route import Routing
from tpx.record import Record
from tpx.split import split

D, E = 12, 8
DISPATCHES = {"local": Local, "replicated": Replicated, "gather": Gather, "all_to_all": AllToAll}


class Case(NamedTuple):
    """tokens: of each dp group (the first dp of them). experts: those that routing may choose."""

    name: str
    tokens: tuple[int, int, int, int]
    top_k: int
    experts: tuple[int, ...] = tuple(range(E))
    shuffled: bool = False  # experts lie on random ranks and slots
    units: int = 6  # of the intermediate dimension; fewer than etp: a rank holds none


CASES = [
    Case("even", (4, 4, 4, 4), 2),
    Case("uneven, not divisible by slices", (5, 3, 7, 1), 3, shuffled=True),
    Case("a dp group without tokens", (0, 5, 0, 2), 2),
    Case("the last dp groups without tokens", (3, 0, 0, 0), 4),
    Case("nobody has a token", (0, 0, 0, 0), 2),
    Case("one token, so slices are empty", (1, 1, 0, 1), 2, shuffled=True),
    Case("every token on one expert", (5, 6, 3, 2), 1, experts=(5,)),
    Case("every token on the same two", (3, 5, 2, 1), 2, experts=(0, 1)),
    Case("experts and ranks without a token", (6, 4, 3, 5), 2, experts=(6, 7, 4)),
    Case("all experts of every token", (3, 2, 1, 2), E, shuffled=True),
    Case("a rank without a unit of any expert", (5, 2, 3, 4), 2, units=3),
]


class Problem(NamedTuple):
    """All tokens of all dp groups, and all experts; every rank computes the same one."""

    h_TD: Tensor
    routing: Routing
    up_EDF: Tensor
    down_EFD: Tensor
    bias_ED: Tensor
    pull_TD: Tensor  # the loss is the sum of out_TD * pull_TD


def problem(case: Case, dp: int) -> Problem:
    total = sum(case.tokens[:dp])
    index = torch.arange(total).unsqueeze(1)
    h_TD = torch.sin(index * 1.7 + torch.arange(D))
    random = torch.Generator().manual_seed(len(case.name))
    allowed = torch.tensor(case.experts)
    chosen = torch.rand(total, len(allowed), generator=random).argsort(1)[:, : case.top_k]
    weights = torch.rand(total, case.top_k, generator=random).softmax(1)
    up = torch.randn(E, D, case.units, generator=random) / D**0.5
    down = torch.randn(E, case.units, D, generator=random)
    bias = torch.arange(E).unsqueeze(1) * 0.1 + torch.arange(D) * 0.01
    pull = torch.cos(index * 0.9 - torch.arange(D))
    return Problem(h_TD, Routing(allowed[chosen], weights), up, down, bias, pull)


def oracle(p: Problem, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """out_TD and the gradients of h_TD and the weights, each token on its own."""
    h_TD, weights_TK = (
        p.h_TD.clone().requires_grad_(),
        p.routing.weights_TK.clone().requires_grad_(),
    )
    rows = []
    for t in range(len(h_TD)):
        parts = []
        for k in range(top_k):
            e = int(p.routing.expert_ids_TK[t, k])
            y_D = torch.tanh(h_TD[t] @ p.up_EDF[e]) @ p.down_EFD[e] + p.bias_ED[e]
            parts.append(weights_TK[t, k] * y_D)
        rows.append(sum(parts))
    out_TD = torch.stack(rows) if rows else h_TD * 1.0
    if rows:
        (out_TD * p.pull_TD).sum().backward()
    zeros = torch.zeros_like
    h_grad = zeros(h_TD) if h_TD.grad is None else h_TD.grad
    return out_TD.detach(), h_grad, zeros(weights_TK) if not rows else weights_TK.grad


def owners(case: Case, ep: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """owner_E, slot_E: in order, or every expert somewhere else."""
    places = [(owner, slot) for owner in range(ep) for slot in range(E // ep)]
    if case.shuffled:
        order = torch.randperm(E, generator=torch.Generator().manual_seed(3)).tolist()
        places = [places[i] for i in order]
    return tuple(owner for owner, _ in places), tuple(slot for _, slot in places)


class Answer(NamedTuple):
    out_TD: Tensor
    h_grad: Tensor
    weights_grad: Tensor
    records: list[Record]  # of the forward pass
    computed: int  # rows that its experts computed


def answer(case: Case, mesh: Mesh, name: str, groups: Groups, p: Problem) -> Answer:
    """This rank's own part: its dp group's tokens through its own experts."""
    rank = distributed.get_rank()
    c = mesh.coords(rank)
    start = sum(case.tokens[: c.dp])
    mine = slice(start, start + case.tokens[c.dp])
    owner_E, slot_E = owners(case, mesh.ep)
    here = sorted((e for e in range(E) if owner_E[e] == c.ep), key=lambda e: slot_E[e])
    units = slice(*split(case.units, mesh.etp)[c.etp])

    placement = place(owner_E, slot_E, groups)
    moves: Dispatch = DISPATCHES[name](placement, groups)
    h_TD = p.h_TD[mine].clone().requires_grad_()
    weights_TK = p.routing.weights_TK[mine].clone().requires_grad_()
    routing = Routing(p.routing.expert_ids_TK[mine], weights_TK)
    bias = p.bias_ED[here] if c.etp == 0 else None
    with groups.recording() as records:
        d = moves.dispatch(h_TD, routing, max(case.tokens[: mesh.dp]))
        ids_PK, weights_PK = d.routing
        order_N, counts_e = sort_by_expert(placement.local_E[ids_PK.flatten()], len(here))
        x_ND = d.x_PD[order_N // case.top_k]
        h_NF = torch.tanh(grouped_mm(x_ND, counts_e, p.up_EDF[here][:, :, units], None))
        y_ND = grouped_mm(h_NF, counts_e, p.down_EFD[here][:, units], bias)
        sum_PD = weighted_sum(y_ND, inverse(order_N).view_as(ids_PK), weights_PK)
        out_TD = moves.combine(sum_PD, d.back)
    forward = list(records)
    (out_TD * p.pull_TD[mine]).sum().backward()
    assert h_TD.grad is not None
    assert weights_TK.grad is not None
    computed = int(counts_e.sum())
    return Answer(out_TD.detach(), h_TD.grad, weights_TK.grad, forward, computed)


def answers(mesh: Mesh, name: str, cases: list[Case]) -> list[Answer]:
    groups = Groups(mesh, distributed.get_rank(), torch.device("cpu"))
    found = [answer(case, mesh, name, groups, problem(case, mesh.dp)) for case in cases]
    groups.close()
    return found
