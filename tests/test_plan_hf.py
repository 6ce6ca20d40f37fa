"""A `tp_plan` dict in Hugging Face's form: what it means here, and what it cannot mean."""

from __future__ import annotations

import pytest
from headers import layout_of, make_config, write_folder

from tpx.errors import PlanError
from tpx.mesh import Mesh
from tpx.plan.hf import MEANINGS, from_hf
from tpx.plan.load import parse_plan
from tpx.plan.prepare import prepare

ATTENTION = "model.layers.*.self_attn"
EXPERTS = "layers.*.mlp.experts"  # as in base_model_ep_plan: without the base model's prefix
DENSE = {
    f"{ATTENTION}.q_proj": "colwise",
    f"{ATTENTION}.k_proj": "colwise",
    f"{ATTENTION}.v_proj": "colwise",
    f"{ATTENTION}.o_proj": "rowwise",
    f"{ATTENTION}.sinks": "colwise",
    ATTENTION: "local_params",
    "model.embed_tokens": "embedding_rowwise",
    "lm_head": "colwise_gather_output",
}
EP = {
    f"{EXPERTS}.gate_up_proj": "grouped_gemm",
    f"{EXPERTS}.gate_up_proj_bias": "grouped_gemm",
    f"{EXPERTS}.down_proj": "grouped_gemm",
    f"{EXPERTS}.down_proj_bias": "grouped_gemm",
    EXPERTS: "ep_dispatch_experts",
}


def imported(tp_plan, world=2, **config):
    return from_hf(tp_plan, layout_of(make_config(**config)), "gpt_oss", world)


def styles(plan) -> dict[str, str]:
    return {rule.pattern: rule.style for rule in plan.rules}


def test_a_whole_plan_is_our_own_tp2_ep2(tmp_path):
    folder = str(write_folder(tmp_path))
    theirs, ours = prepare(folder, DENSE | EP, 2), prepare(folder, "tp2-ep2", 2)
    assert theirs.report == ()
    assert theirs.plan.mesh == ours.plan.mesh == Mesh(tp=2, ep=2)
    for rank in range(2):
        a, b = theirs.rank_plan(rank), ours.rank_plan(rank)
        assert {n: s.ranges for n, s in a.shards.items()} == {
            n: s.ranges for n, s in b.shards.items()
        }
        assert (a.cuts, a.dispatch, a.owner_E) == (b.cuts, b.dispatch, b.owner_E)


@pytest.mark.parametrize("changes", [{}, {"quantization_config": None}], ids=["mxfp4", "plain"])
def test_their_names_of_expert_weights_mean_the_packed_ones_too(changes):
    del (named := dict(EP))[EXPERTS]
    plan, notes = imported(named, **changes)
    assert styles(plan)["model.layers.*.mlp.experts"] == "expert"
    assert plan.mesh == Mesh(tp=2, ep=2)
    assert notes == (
        "tp_plan does not name model.embed_tokens, model.layers.*.self_attn.{q,k,v,o}_proj, "
        "model.layers.*.self_attn.sinks, lm_head: every rank holds it whole",
    )


def test_what_it_does_not_name_is_replicated_and_said(tmp_path):
    prepared = prepare(str(write_folder(tmp_path)), DENSE, 4)
    assert prepared.plan.mesh == Mesh(tp=4, edp=4)
    assert prepared.report == (
        "tp_plan does not name model.layers.*.mlp.experts: every rank holds it whole",
    )
    again = parse_plan(prepared.plan_text(), "p")
    assert styles(again) == styles(prepared.plan)
    assert prepared.plan_text().startswith("# tp_plan does not name model.layers.*.mlp.experts")


def test_an_empty_dict_replicates_everything():
    plan, notes = imported({})
    assert set(styles(plan).values()) == {"replicate"}
    assert "model.embed_tokens" in notes[0]
    assert imported({}, world=1)[1] == ()


def test_the_old_words_for_sinks_are_read():
    old = DENSE | {f"{ATTENTION}.sinks": "local_rowwise", f"{EXPERTS}": "gather"}
    assert styles(imported(old)[0])["model.layers.*.self_attn.sinks"] == "colwise"


MISTAKES = {
    "unknown word": (
        {"lm_head": "columnwise"},
        "plan `tp_plan`: `lm_head` has style `columnwise`, which has no equal here",
        "use " + ", ".join(f"`{w}`" for w in list(MEANINGS)[:-1]) + f" or `{list(MEANINGS)[-1]}`",
    ),
    "another layout": (
        {f"{EXPERTS}.gate_up_proj": "packed_colwise"},
        "plan `tp_plan`: `layers.*.mlp.experts.gate_up_proj` has style `packed_colwise`, which has "
        "no equal here",
        None,
    ),
    "half a vocabulary": (
        {"lm_head": "colwise"},
        "plan `tp_plan`: style `colwise` does not fit `lm_head.weight`",
        "use `colwise_rep`, `colwise_gather_output`, `embedding_rowwise`, "
        "`vocab_parallel_rowwise` or `replicate`",
    ),
    "a name that is not there": (
        {"model.layers.*.self_attn.qkv_proj": "colwise"},
        "plan `tp_plan`: `model.layers.*.self_attn.qkv_proj` matches nothing: "
        "`model.layers.*.self_attn` has no `qkv_proj`",
        "use `k_proj`, `o_proj`, `q_proj`, `sinks` or `v_proj`",
    ),
    "one layer": (
        {"model.layers.0.self_attn.q_proj": "colwise"},
        "plan `tp_plan` cuts a part of `model.layers.*.self_attn.q_proj`: "
        "`model.layers.0.self_attn.q_proj.weight` is `colwise`, and "
        "`model.layers.1.self_attn.q_proj.weight` is not",
        "name `model.layers.*.self_attn.q_proj` as a whole: its parameters, and all layers, are "
        "cut alike",
    ),
    "two words": (
        {ATTENTION: "replicate", f"{ATTENTION}.q_proj": "colwise"},
        "plan `tp_plan`: `model.layers.*.self_attn` and `model.layers.*.self_attn.q_proj` give "
        "`model.layers.*.self_attn.q_proj.weight` two styles",
        "delete one of the two",
    ),
    "not a word": (
        {3: "colwise"},
        "plan `tp_plan`: key `3` is not a pattern",
        "write `'lm_head': ...`",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_has_no_equal_here_is_an_error(case):
    tp_plan, message, hint = MISTAKES[case]
    with pytest.raises(PlanError) as error:
        imported(tp_plan)
    assert error.value.message == message
    assert hint is None or error.value.hint == hint


def test_an_attention_plan_without_sinks_is_never_a_wrong_answer(tmp_path):
    del (plan := dict(DENSE))[f"{ATTENTION}.sinks"]
    folder = str(write_folder(tmp_path))
    with pytest.raises(PlanError) as error:
        prepare(folder, plan, 2)
    assert error.value.message == (
        "plan `tp_plan`: `model.layers.*.self_attn.q_proj.weight` cuts num_attention_heads over "
        "tp, but `model.layers.*.self_attn.sinks` holds it whole"
    )
