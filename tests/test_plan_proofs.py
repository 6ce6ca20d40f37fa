"""What is proved before anything starts: each wrong plan, word for word."""

from __future__ import annotations

import pytest
from plan_texts import check, plan_text, refusal


def test_a_plan_that_fits_gives_its_proofs(tmp_path):
    proofs = check(plan_text(), tmp_path)
    assert len(proofs) == 7
    assert ("every parameter has exactly one rule, and its style fits", 41) in proofs


LAYERS = "model.layers.*"
MISMATCH = "plan `p.yaml` is for 2 ranks (tp 2 x ep 2), and there "
WRONG_PLANS = {
    "typo in a pattern": (
        {"q,k,v}_proj": None, "model.layers.*.self_atn.{q,k,v}_proj": "colwise"},
        "plan `p.yaml`, line 13: `model.layers.*.self_atn.{q,k,v}_proj` matches nothing: "
        "`model.layers.*` has no `self_atn`",
        "did you mean `self_attn`?",
    ),
    "one alternative too many": (
        {"q,k,v}_proj": None, "model.layers.*.self_attn.{q,k,v,w}_proj": "colwise"},
        "plan `p.yaml`, line 13: `model.layers.*.self_attn.{q,k,v,w}_proj` matches nothing: "
        "`model.layers.*.self_attn` has no `w_proj`",
        "did you mean `v_proj`, `q_proj` or `o_proj`?",
    ),
    "a first name that is not there": (
        {"model.norm": None, "noorm": "replicate"},
        "plan `p.yaml`, line 13: `noorm` matches nothing: there is no `noorm`",
        "use `lm_head` or `model`",
    ),
    "a name below a parameter": (
        {"sinks": None, "model.layers.*.self_attn.sinks.weight": "colwise"},
        "plan `p.yaml`, line 13: `model.layers.*.self_attn.sinks.weight` matches nothing: "
        "`model.layers.*.self_attn.sinks` has no `weight`",
        "nothing lies under `model.layers.*.self_attn.sinks`",
    ),
    "a parameter without a rule": (
        {"sinks": None},
        "plan `p.yaml` has no rule for `model.layers.*.self_attn.sinks`",
        "add a line `model.layers.*.self_attn.sinks: STYLE` with style `colwise` or `replicate`",
    ),
    "a layer without a rule": (
        {"mlp.router": None, "model.layers.0.mlp.router": "replicate"},
        "plan `p.yaml` has no rule for `model.layers.1.mlp.router.weight`",
        "add a line `model.layers.1.mlp.router.weight: STYLE` with style `replicate`",
    ),
    "two rules": (
        {"model.layers.*.self_attn": "replicate"},
        "plan `p.yaml`, lines 6 and 14: both `model.layers.*.self_attn.{q,k,v}_proj` and "
        "`model.layers.*.self_attn` match `model.layers.0.self_attn.q_proj.weight`",
        "change one of them: exactly one rule may match a parameter, and order has no meaning",
    ),
    "a head in columns": (
        {"lm_head": "colwise"},
        "plan `p.yaml`, line 13: style `colwise` does not fit `lm_head.weight`",
        "use `vocab` or `replicate`",
    ),
    "a norm cut": (
        {"model.norm": "colwise"},
        "plan `p.yaml`, line 12: style `colwise` does not fit `model.norm.weight`",
        "use `replicate`",
    ),
    "experts in rows": (
        {"mlp.experts": "rowwise"},
        "plan `p.yaml`, line 10: style `rowwise` does not fit "
        "`model.layers.0.mlp.experts.gate_up_proj_blocks`",
        "use `expert` or `replicate`",
    ),
    "o_proj in columns": (
        {"o_proj": "colwise"},
        "plan `p.yaml`, line 8: style `colwise` does not fit "
        "`model.layers.0.self_attn.o_proj.weight`",
        "use `rowwise` or `replicate`",
    ),
    "o_proj whole": (
        {"o_proj": "replicate"},
        "plan `p.yaml`, lines 6 and 8: `model.layers.*.self_attn.q_proj.weight` cuts "
        "num_attention_heads over tp, but `model.layers.*.self_attn.o_proj.weight` holds it whole",
        "use `rowwise` for `model.layers.*.self_attn.o_proj.weight`, or `replicate` for both",
    ),
    "sinks whole": (
        {"sinks": "replicate"},
        "plan `p.yaml`, lines 6 and 7: `model.layers.*.self_attn.q_proj.weight` cuts "
        "num_attention_heads over tp, but `model.layers.*.self_attn.sinks` holds it whole",
        "use `colwise` for `model.layers.*.self_attn.sinks`, or `replicate` for both",
    ),
    "keys whole": (
        {
            "q,k,v}_proj": None,
            "model.layers.*.self_attn.q_proj": "colwise",
            "model.layers.*.self_attn.{k,v}_proj": "replicate",
        },
        "plan `p.yaml`, lines 13 and 14: `model.layers.*.self_attn.q_proj.weight` cuts "
        "num_attention_heads over tp, but `model.layers.*.self_attn.k_proj.weight` holds "
        "num_key_value_heads whole",
        "use `colwise` for `model.layers.*.self_attn.k_proj.weight`, or `replicate` for both",
    ),
    "scales whole": (
        {
            "mlp.experts": None,
            "model.layers.*.mlp.experts.{gate_up,down}_proj_{blocks,bias}": "expert",
            "model.layers.*.mlp.experts.{gate_up,down}_proj_scales": "replicate",
        },
        "plan `p.yaml`, lines 13 and 14: `model.layers.*.mlp.experts.gate_up_proj_blocks` cuts "
        "num_local_experts over ep, but `model.layers.*.mlp.experts.gate_up_proj_scales` holds it "
        "whole",
        "use `expert` for `model.layers.*.mlp.experts.gate_up_proj_scales`, or `replicate` for "
        "both",
    ),
    "experts whole on a mesh with ep": (
        {"mlp.experts": "replicate"},
        "plan `p.yaml` has ep 2, and no rule cuts the experts",
        "use style `expert` for them, or `edp` in the mesh to hold them whole",
    ),
    "experts that differ": (
        {
            "mlp.experts": None,
            "model.layers.*.mlp.experts.{gate_up,down}_proj_{blocks,scales}": "expert",
            "model.layers.*.mlp.experts.{gate_up,down}_proj_bias": "{style: expert, uneven: true}",
        },
        "plan `p.yaml`, lines 13 and 14: two rules for experts differ in `dispatch` or `uneven`",
        "write one rule for all parameters of the experts",
    ),
    "gather where all see the same tokens": (
        {"mlp.experts": "{style: expert, dispatch: gather}"},
        "plan `p.yaml`, line 10: dispatch `gather` does not fit the mesh: the 2 ranks of an expert "
        "group lie in one tp group and see the same tokens",
        "leave `dispatch` out, or say `auto`",
    ),
}


@pytest.mark.parametrize("case", WRONG_PLANS)
def test_a_plan_that_would_compute_wrongly_is_an_error(tmp_path, case):
    changes, message, hint = WRONG_PLANS[case]
    assert refusal(plan_text(**changes), tmp_path) == (message, hint)


DISPATCH = "plan `p.yaml`, line 10: dispatch `{}` does not fit the mesh: {}"


@pytest.mark.parametrize(
    ("mesh", "word", "reason"),
    [
        (
            "{dp: 2, ep: 2}",
            "replicated",
            "an expert group of 2 ranks spans 2 tp groups, whose tokens differ",
        ),
        (
            "{tp: 2, edp: 2}",
            "all_to_all",
            "ep and etp are 1, so each rank holds every expert and sends nothing",
        ),
        (
            "{tp: 2, etp: 2}",
            "all_to_all",
            "ep is 1, so every rank holds a part of every expert",
        ),
    ],
)
def test_a_dispatch_that_does_not_fit_the_mesh(tmp_path, mesh, word, reason):
    rule = f"{{style: expert, dispatch: {word}, uneven: true}}"
    text = plan_text(mesh, **{"mlp.experts": rule})
    assert refusal(text, tmp_path)[0] == DISPATCH.format(word, reason)


def test_a_plan_for_another_number_of_ranks_names_those_that_fit(tmp_path):
    assert refusal(plan_text(), tmp_path, world=1) == (
        MISMATCH + "is 1",
        "start 2 ranks (`tpx launch --nproc 2`), or use a plan for 1: `tp1` or `auto`",
    )
    assert refusal(plan_text(), tmp_path, world=4) == (
        MISMATCH + "are 4",
        "start 2 ranks (`tpx launch --nproc 2`), or use a plan for 4: `dp2-tp2-edp2-ep2`, "
        "`dp2-tp2-ep2-etp2`, `dp2-tp2-ep4`, `ep4`, `tp4-ep2-etp2`, `tp4-ep4`, `tp4-etp4`, `tp4` "
        "or `auto`",
    )
    assert refusal(plan_text(), tmp_path, world=3)[1] == (
        "start 2 ranks (`tpx launch --nproc 2`), or use a plan for 3: `auto`"
    )


def test_a_plan_for_another_model_says_so(tmp_path):
    text = plan_text().replace("model: gpt_oss", "model: mixtral")
    assert refusal(text, tmp_path) == (
        "plan `p.yaml` is for model `mixtral`, and `config.json` says `gpt_oss`",
        "use a plan for `gpt_oss`, or write `model: gpt_oss`",
    )


def test_a_plan_is_held_to_its_limits(tmp_path):
    assert refusal(plan_text(limits="limits: {memory: 1KB, context: 100, batch: 3}"), tmp_path) == (
        "plan `p.yaml` needs 169,008 bytes on rank 0, 25,344 of them KV cache for 3 x 100 tokens, "
        "over its limit of 1,000",
        "cut over more ranks, or lower `context` or `batch`",
    )
    assert refusal(plan_text(limits="limits: {max_replicated: 0}"), tmp_path) == (
        "plan `p.yaml` replicates 0.0105 of the weights' bytes, over its limit of 0",
        "cut more modules, or raise `max_replicated`",
    )
    assert refusal(plan_text(limits="limits: {context: 257}"), tmp_path) == (
        "plan `p.yaml` has limit context 257, and the model has 256 positions",
        "use a context of 256 or less",
    )
    kept = check(plan_text(limits="limits: {memory: 1MB, max_replicated: 0.5}"), tmp_path)
    assert len(kept) == 9
