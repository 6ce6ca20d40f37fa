"""What is proved before anything starts: each wrong plan, word for word."""

from __future__ import annotations

import pytest
from plan_texts import check, plan_text, refusal

from tpx.errors import PlanError
from tpx.mesh import Mesh
from tpx.plan.codes import PROOFS
from tpx.plan.load import parse_plan
from tpx.plan.proofs import one_block


def test_a_plan_that_fits_gives_its_proofs(tmp_path):
    proofs = {proof.name: proof for proof in check(plan_text(), tmp_path)}
    assert list(proofs) == ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C13", "C14"]
    assert proofs["C1"][:2] == ("every tensor is used, and every parameter has one rule", 41)
    assert proofs["C13"][:2] == ("every collective belongs to a step, and no step lacks one", 4)
    assert all(proof.codes == PROOFS[name] for name, proof in proofs.items())


def test_limits_and_tied_weights_have_proofs_of_their_own(tmp_path):
    limits = "limits: {memory: 1MB, max_replicated: 0.5}"
    proofs = check(plan_text(limits=limits), tmp_path, tie_word_embeddings=True)
    assert {proof.name for proof in proofs} == PROOFS.keys()


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
        "plan `p.yaml` replicates 0.0105 of the weights' bytes, over its limit of 0; the largest: "
        "`model.layers.*.mlp.router` 2,080 bytes (no style cuts it); "
        "`model.layers.*.input_layernorm` 256 bytes (no style cuts it); "
        "`model.layers.*.self_attn.o_proj.bias` 256 bytes (a bias on a sum, which is added once)",
        "cut more modules, or raise `max_replicated`",
    )
    assert refusal(plan_text(limits="limits: {context: 257}"), tmp_path) == (
        "plan `p.yaml` has limit context 257, and the model has 256 positions",
        "use a context of 256 or less",
    )
    text = plan_text(limits="limits: {max_replicated: 0}", **{"embed_tokens": "replicate"})
    assert "`model.embed_tokens` 16,768 bytes (`vocab` would cut it)" in refusal(text, tmp_path)[0]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"o_proj": "replicate"}, "P301"),
        ({"o_proj": "colwise"}, "P404"),
        ({"sinks": None}, "P101"),
        ({"noorm": "replicate"}, "P402"),
        ({"lm_head.weight": "vocab"}, "P403"),
        ({"mlp.experts": "replicate"}, "P302"),
        ({"mlp.experts": "{style: expert, dispatch: gather}"}, "P406"),
        ({"mlp.experts": "{style: expert, dispatsh: gather}"}, "P401"),
        ({"o_proj": "rowise"}, "P401"),
        ({"o_proj": "{style: rowwise, uneven: true}"}, "P413"),
        ({"mesh": "{tp: 1, edp: 1}", "o_proj": "replicate"}, "P405"),
        ({"mesh": "{tp: 3, edp: 3}"}, "P201"),
        ({"mesh": "{tp: 4, etp: 4}"}, "P407"),
        ({"mesh": "{dp: 3, ep: 3}"}, "P418"),
        ({"mesh": "{tp: 2, ep: 3}"}, "P304"),
        ({"mesh": "{tp: 0}"}, "P303"),
        ({"mesh": "{dp: 2, etp: 2}"}, "P305"),
        ({"mesh": "{dp: 3, tp: 2, edp: 2, ep: 3}"}, "P306"),
        ({"mesh": "{dp: 2, ep: 2}", "mlp.experts": "{style: expert, dispatch: replicated}"},
         "P307"),
        ({"mesh": "{dp: 2, etp: 2}", "mlp.experts": "{style: expert, dispatch: gather}"}, "P417"),
        ({"limits": "limits: {memory: 1KB}"}, "P414"),
        ({"limits": "limits: {max_replicated: 0}"}, "P415"),
        ({"limits": "limits: {context: 300}"}, "P416"),
    ],
)  # fmt: skip
def test_every_refusal_has_a_code_that_says_its_class(tmp_path, changes, code):
    with pytest.raises(PlanError) as error:
        check(plan_text(**changes), tmp_path)
    assert error.value.code == code
    assert error.value.render().startswith(f"error[{code}]: plan `p.yaml`")


def test_a_mesh_of_a_thousand_ranks_is_proved_as_one_of_its_blocks(tmp_path):
    """128 tp groups of 8 that send nothing to each other: as many facts as on 8 ranks."""
    few = check(plan_text("{tp: 8, ep: 8}"), tmp_path)
    many = check(plan_text("{dp: 128, tp: 8, edp: 128, ep: 8}"), tmp_path)
    assert [(p.name, p.facts) for p in few] == [(p.name, p.facts) for p in many]
    assert one_block(parse_plan(plan_text("{dp: 16, tp: 2, edp: 4, ep: 8}"), "p")).mesh == Mesh(
        dp=4, tp=2, ep=8
    )


def test_a_rank_without_a_row_of_the_vocabulary_is_an_error(tmp_path):
    assert refusal(plan_text("{tp: 4, ep: 4}"), tmp_path, vocab_size=3) == (
        "plan `p.yaml`, line 5: `model.embed_tokens` cuts vocab_size 3 over tp 4, and 1 of the "
        "ranks would hold no row",
        "use `replicate`, or tp 3 or less",
    )
