"""A whole MoE layer of gpt-oss at every shipped mesh, against each token computed on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import ranks
from torch import Tensor, distributed

from tpx.batch import Batch
from tpx.comm import Groups
from tpx.families import gpt_oss
from tpx.families.spec import ModelSpec, Rope
from tpx.layers.norm import RMSNorm
from tpx.mesh import Mesh
from tpx.moe.layer import MoELayer
from tpx.mxfp4 import Mxfp4, dequantize, quantize
from tpx.plan.types import Cut, DispatchPlan, RankPlan
from tpx.split import split

PREFIX = "model.layers.0.mlp."
HERE = ("local", "local")
SHARED = ("replicated", "replicated")
# Of each shipped plan's mesh: the dispatch for prefill, and that for decode.
MESHES = {
    "tp1": (Mesh(), HERE),
    "tp2": (Mesh(tp=2, edp=2), HERE),
    "ep2": (Mesh(tp=2, ep=2), SHARED),
    "tp2-etp2": (Mesh(tp=2, etp=2), SHARED),
    "dp2-ep2": (Mesh(dp=2, ep=2), ("all_to_all", "gather")),
    "tp4": (Mesh(tp=4, edp=4), HERE),
    "tp4-ep4": (Mesh(tp=4, ep=4), ("all_to_all", "replicated")),
    "tp4-etp4": (Mesh(tp=4, etp=4), SHARED),
    "tp4-ep2-etp2": (Mesh(tp=4, ep=2, etp=2), SHARED),
    "dp2-tp2-ep4": (Mesh(dp=2, tp=2, ep=4), ("all_to_all", "gather")),
    "dp2-tp2-ep2-etp2": (Mesh(dp=2, tp=2, ep=2, etp=2), ("gather", "all_to_all")),
    "dp2-tp2-edp2-ep2": (Mesh(dp=2, tp=2, edp=2, ep=2), ("all_to_all", "replicated")),
}
TOKENS = (5, 2)  # of each dp group
EPS = 1e-5


def spec_of(experts: Any) -> ModelSpec:
    """3 blocks of intermediate units: 2 and 1 on two ranks; on four, the last holds none."""
    return ModelSpec(
        model_type="gpt_oss",
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=3,
        max_position_embeddings=128,
        sliding_window=8,
        layer_types=("full_attention",),
        rms_norm_eps=1e-5,
        rope=Rope(10000.0),
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        tie_word_embeddings=False,
        dtype="float32",
        experts=experts,
        eos_token_ids=(0,),
    )


def weights(spec: ModelSpec) -> dict[str, Tensor]:
    """All of the layer's parameters, whole, as the checkpoint has them."""
    random = torch.Generator().manual_seed(5)
    e, h, f = spec.num_local_experts, spec.hidden_size, spec.intermediate_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    found = {
        "router.weight": draw(e, h) / h**0.5,
        "router.bias": draw(e) * 0.1,
        "experts.gate_up_proj_bias": draw(e, 2 * f),
        "experts.down_proj_bias": draw(e, h),
    }
    # Some gates and ups are beyond the limit of 7.
    for name, rows, inputs in (("gate_up_proj", 2 * f, h), ("down_proj", h, f)):
        packed = quantize(draw(e, rows, inputs) * (3 / inputs**0.5))
        if spec.experts == "mxfp4":
            found[f"experts.{name}_blocks"], found[f"experts.{name}_scales"] = packed
        else:
            found[f"experts.{name}"] = dequantize(packed, torch.float32).transpose(1, 2)
    return found


def matrices(whole: dict[str, Tensor], name: str) -> Tensor:
    """[E, inputs, outputs] of either storage."""
    if f"experts.{name}" in whole:
        return whole[f"experts.{name}"]
    packed = Mxfp4(whole[f"experts.{name}_blocks"], whole[f"experts.{name}_scales"])
    return dequantize(packed, torch.float32).transpose(1, 2)


def one_token(x_D: Tensor, whole: dict[str, Tensor], spec: ModelSpec) -> Tensor:
    """The layer's output for one token with its residual, written out."""
    h_D = x_D / (x_D.square().mean() + EPS).sqrt() * norm_weights(spec)[0]
    logits_E = whole["router.weight"] @ h_D + whole["router.bias"]
    top = logits_E.topk(spec.num_experts_per_tok)
    total = x_D
    for weight, e in zip(top.values.softmax(0), top.indices, strict=True):
        both = h_D @ matrices(whole, "gate_up_proj")[e] + whole["experts.gate_up_proj_bias"][e]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        y_D = inner @ matrices(whole, "down_proj")[e] + whole["experts.down_proj_bias"][e]
        total = total + weight * y_D
    return total


def norm_weights(spec: ModelSpec) -> Tensor:
    """[2, H]: of the norm before the layer and of the next one's."""
    return torch.rand(2, spec.hidden_size, generator=torch.Generator().manual_seed(8)) + 0.5


def norms(spec: ModelSpec) -> tuple[RMSNorm, RMSNorm]:
    found = tuple(RMSNorm(spec.hidden_size, EPS, torch.float32) for _ in range(2))
    for norm, weight in zip(found, norm_weights(spec), strict=True):
        norm.load_state_dict({"weight": weight})
    return found


def inputs(spec: ModelSpec) -> Tensor:
    """Of all dp groups' tokens, by global index."""
    index = torch.arange(sum(TOKENS)).unsqueeze(1)
    return torch.sin(1.3 * index + torch.arange(spec.hidden_size) * (index + 1))


def rank_plan(spec: ModelSpec, mesh: Mesh, rank: int, dispatch: DispatchPlan) -> RankPlan:
    c = mesh.coords(rank)
    each = spec.num_local_experts // mesh.ep
    cuts = {
        "E": Cut("ep", c.ep * each, (c.ep + 1) * each),
        "I": Cut("etp", *split(spec.intermediate_size, mesh.etp, 32)[c.etp]),
    }
    owner_E, slot_E = zip(*[divmod(e, each) for e in range(spec.num_local_experts)], strict=True)
    return RankPlan(rank, mesh, spec, {}, cuts, dispatch, owner_E, slot_E)


def shard(whole: dict[str, Tensor], plan: RankPlan) -> dict[str, Tensor]:
    """What this rank holds, cut as the family's layout says."""
    found = {}
    parameters = gpt_oss.layout(plan.spec).parameters
    for name, tensor in whole.items():
        for axis, dim in enumerate(parameters[PREFIX + name].dims):
            if dim.logical in plan.cuts:
                cut = plan.cuts[dim.logical]
                ((start, stop),) = dim.ranges(cut.start, cut.stop)
                tensor = tensor.narrow(axis, start, stop - start)
        found[name] = tensor.contiguous()
    return found


def build(plan: RankPlan, groups: Groups) -> MoELayer:
    """As the loader does: made without memory, then given this rank's tensors."""
    with torch.device("meta"):
        layer = MoELayer(plan.spec, plan, groups, torch.float32)
    layer.load_state_dict(shard(weights(plan.spec), plan), strict=True, assign=True)
    return layer


def batch(longest: int, decode: bool) -> Batch:
    nothing = torch.empty(0, dtype=torch.int64)
    pair = (nothing, nothing)
    return Batch(nothing, nothing, nothing, nothing, pair, pair, nothing, longest, decode)


def run(mesh: Mesh, dispatch: tuple[Any, Any], experts: str) -> list[dict[str, Any]]:
    """This rank's dp group through the layer, as prefill and as decode."""
    spec, rank = spec_of(experts), distributed.get_rank() if mesh.world > 1 else 0
    groups = Groups(mesh, rank, torch.device("cpu"))
    layer = build(rank_plan(spec, mesh, rank, DispatchPlan(*dispatch)), groups)
    dp = mesh.coords(rank).dp
    own = inputs(spec) if mesh.dp == 1 else inputs(spec).split(TOKENS)[dp]
    longest = len(inputs(spec)) if mesh.dp == 1 else max(TOKENS)
    found = []
    for decode in (False, True):
        h_TD = own.clone().requires_grad_()
        layer.zero_grad()
        with groups.recording() as records:
            out_TD, _ = layer(h_TD, batch(longest, decode), *norms(spec))
        names = [record.name for record in records]
        out_TD.square().sum().backward()
        router = layer.router
        values = {"out": out_TD.detach(), "h": h_TD.grad, "names": names}
        found.append(values | {"router": router.weight.grad, "router_bias": router.bias.grad})
    with torch.inference_mode():
        out_TD, normed_TD = layer(own, batch(longest, True), *norms(spec))
    close(out_TD, found[1]["out"])
    close(normed_TD, norms(spec)[1](out_TD).detach())
    groups.close()
    return found


def expected(spec: ModelSpec) -> dict[str, Tensor]:
    """Output and gradients of all tokens, from the written-out layer."""
    whole = weights(spec)
    for name in ("router.weight", "router.bias"):
        whole[name].requires_grad_()
    h_TD = inputs(spec).requires_grad_()
    out_TD = torch.stack([one_token(h_D, whole, spec) for h_D in h_TD])
    out_TD.square().sum().backward()
    return {
        "out": out_TD.detach(),
        "h": h_TD.grad,
        "router": whole["router.weight"].grad,
        "router_bias": whole["router.bias"].grad,
    }


def close(mine: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max().item()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * scale)


def compare(mesh: Mesh, by_rank: list[list[dict[str, Any]]], whole: dict[str, Tensor]) -> None:
    """Outputs and input gradients are those of the group's tokens; router gradients add up to the
    whole over dp."""
    parts = {k: [whole[k]] if mesh.dp == 1 else whole[k].split(TOKENS) for k in ("out", "h")}
    for phase in (0, 1):
        for rank, found in enumerate(by_rank):
            dp = mesh.coords(rank).dp
            close(found[phase]["out"], parts["out"][dp])
            close(found[phase]["h"], parts["h"][dp])
            assert torch.equal(found[phase]["out"], by_rank[dp * mesh.tp][phase]["out"])
        for tp in range(mesh.tp):
            same = [by_rank[dp * mesh.tp + tp][phase] for dp in range(mesh.dp)]
            for key in ("router", "router_bias"):
                close(sum(found[key] for found in same), whole[key])


# Plain experts on 4 ranks are in `make test-more`: dispatch does not know the form of experts.
CASES = [
    pytest.param(plan, experts, marks=[pytest.mark.more] * (experts == "plain" and mesh.world == 4))
    for plan, (mesh, _) in MESHES.items()
    for experts in ("mxfp4", "plain")
]


@pytest.mark.parametrize(("plan", "experts"), CASES)
def test_outputs_and_gradients_equal_those_of_one_rank(plan: str, experts: str):
    mesh, dispatch = MESHES[plan]
    if mesh.world == 1:
        by_rank = [run(mesh, dispatch, experts)]
    else:
        by_rank = ranks(mesh.world).run(run, mesh, dispatch, experts)
    compare(mesh, by_rank, expected(spec_of(experts)))


def test_prefill_and_decode_move_tokens_as_the_plan_says():
    first = {"all_to_all": "moe.counts", "gather": "moe.gather_tokens", "replicated": "moe.combine"}
    for plan in ("dp2-ep2", "ep2"):
        mesh, dispatch = MESHES[plan]
        for found in ranks(2).run(run, mesh, dispatch, "mxfp4"):
            assert [phase["names"][0] for phase in found] == [first[name] for name in dispatch]


def test_packed_weights_stay_packed_and_nothing_but_the_router_has_a_gradient():
    plan = rank_plan(spec_of("mxfp4"), Mesh(), 0, DispatchPlan("local", "local"))
    layer = build(plan, Groups.alone(torch.device("cpu")))
    e, h, f = 8, 64, 96
    shapes = {
        name.removeprefix("experts."): (tuple(p.shape), p.dtype)
        for name, p in layer.named_parameters()
        if not p.requires_grad
    }
    assert shapes == {
        "gate_up_proj_blocks": ((e, 2 * f, h // 32, 16), torch.uint8),
        "gate_up_proj_scales": ((e, 2 * f, h // 32), torch.uint8),
        "gate_up_proj_bias": ((e, 2 * f), torch.float32),
        "down_proj_blocks": ((e, h, f // 32, 16), torch.uint8),
        "down_proj_scales": ((e, h, f // 32), torch.uint8),
        "down_proj_bias": ((e, h), torch.float32),
    }
