"""MoELayer: router, experts, and the dispatch between them, one for prefill and one for decode.

Knows a rank's plan and groups; not the checkpoint, and no other layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..comm import Groups
from ..families.spec import ModelSpec
from ..layers.norm import RMSNorm
from ..ops.kernel import REFERENCE, Kernels
from ..ops.route import Router, norm_route
from ..plan.types import DispatchName, RankPlan
from .dispatch import AllToAll, Dispatch, Gather, Local, Replicated, place
from .experts import Experts

DISPATCHES: dict[DispatchName, type[Local | Replicated | Gather | AllToAll]] = {
    "local": Local,
    "replicated": Replicated,
    "gather": Gather,
    "all_to_all": AllToAll,
}
SAME_TOKENS = Local, Replicated  # what a rank's experts see is what its router saw


class MoELayer(nn.Module):
    """router.weight [E, D] and router.bias [E], whole; and the experts that the plan puts here."""

    def __init__(
        self,
        spec: ModelSpec,
        rank_plan: RankPlan,
        groups: Groups,
        dtype: torch.dtype,
        kernels: Kernels = REFERENCE,
    ):
        super().__init__()
        self.kernel = kernels.get("route")
        self.top_k = spec.num_experts_per_tok
        self.router = nn.Linear(spec.hidden_size, spec.num_local_experts, dtype=dtype)
        placement = place(rank_plan.owner_E, rank_plan.slot_E, groups)
        assert placement.num_local == rank_plan.cuts["E"].size, f"{rank_plan.cuts['E']=}"
        first = groups["etp"].rank == 0
        f = rank_plan.cuts["I"].size
        self.experts = Experts(spec, placement, f, dtype, add_bias=first, kernels=kernels)
        self.prefill: Dispatch = DISPATCHES[rank_plan.dispatch.prefill](placement, groups)
        self.decode: Dispatch = DISPATCHES[rank_plan.dispatch.decode](placement, groups)

    def forward(
        self, x_TD: Tensor, batch: Batch, before: RMSNorm, after: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """(x + the weighted sum of each token's experts, the norm of that), the same on every rank
        of a tp group. All ranks of the expert group call it together. before: x's norm for router
        and experts. after: the norm of what comes next."""
        moves = self.decode if batch.decode else self.prefill
        of = Router(before.weight, before.eps, self.router.weight, self.router.bias, self.top_k)
        packed = self.experts.packed
        if packed and packed.routes(self.kernel) and isinstance(moves, SAME_TOKENS):
            y_SND, routing = packed.routed(x_TD, of)
            if isinstance(moves, Local):
                return packed.add(y_SND, routing, x_TD, after.weight, after.eps)
            return after.add(moves.combine(packed.sum(y_SND, routing), None), x_TD)
        h_TD, routing = norm_route(x_TD, of, self.kernel)
        d = moves.dispatch(h_TD, routing, batch.longest)
        if isinstance(moves, Local):
            return self.experts.add(d.x_PD, d.routing, x_TD, after)
        sum_TD = moves.combine(self.experts(d.x_PD, d.routing), d.back)
        return after.add(sum_TD, x_TD)
