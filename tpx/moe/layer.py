"""MoELayer: router, experts, and the dispatch between them, one for prefill and one for decode.

Knows a rank's plan and groups; not the checkpoint, and no other layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..comm import Groups
from ..families.spec import ModelSpec
from ..ops.route import route
from ..plan.types import DispatchName, RankPlan
from .dispatch import AllToAll, Dispatch, Gather, Local, Replicated, place
from .experts import Experts

DISPATCHES: dict[DispatchName, type[Local | Replicated | Gather | AllToAll]] = {
    "local": Local,
    "replicated": Replicated,
    "gather": Gather,
    "all_to_all": AllToAll,
}


class MoELayer(nn.Module):
    """router.weight [E, D] and router.bias [E], whole; and the experts that the plan puts here."""

    def __init__(self, spec: ModelSpec, rank_plan: RankPlan, groups: Groups, dtype: torch.dtype):
        super().__init__()
        self.top_k = spec.num_experts_per_tok
        self.router = nn.Linear(spec.hidden_size, spec.num_local_experts, dtype=dtype)
        placement = place(rank_plan.owner_E, rank_plan.slot_E, groups)
        assert placement.num_local == rank_plan.cuts["E"].size, f"{rank_plan.cuts['E']=}"
        first = groups["etp"].rank == 0
        f = rank_plan.cuts["I"].size
        self.experts = Experts(spec, placement.num_local, f, dtype, add_bias=first)
        self.prefill: Dispatch = DISPATCHES[rank_plan.dispatch.prefill](placement, groups)
        self.decode: Dispatch = DISPATCHES[rank_plan.dispatch.decode](placement, groups)

    def forward(self, h_TD: Tensor, batch: Batch) -> Tensor:
        """out_TD: the weighted sum of each token's experts, the same on every rank of a tp group;
        the caller adds the residual. All ranks of the expert group call it together."""
        moves = self.decode if batch.decode else self.prefill
        routing = route(h_TD, self.router.weight, self.router.bias, self.top_k)
        d = moves.dispatch(h_TD, routing, batch.longest)
        y_RD = self.experts(d.x_RD, d.counts_e)
        return moves.combine(y_RD, routing, d.back)
