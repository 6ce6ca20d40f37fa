"""Flow typing on resolved values: each broken layout, step or collective is refused."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import pytest
from headers import make_config, write_folder
from plan_texts import plan_text

from tpx.errors import PlanError
from tpx.families import family_of
from tpx.families.flow import Flow, Step
from tpx.index import CheckpointIndex
from tpx.mesh import AXES
from tpx.plan.auto import meshes
from tpx.plan.cuts import assign
from tpx.plan.dispatch import choose_dispatch
from tpx.plan.find import shipped_plans
from tpx.plan.flow import HINT, check_flow
from tpx.plan.held import Sent, hold
from tpx.plan.load import load_plan, parse_plan
from tpx.plan.proofs import check_tied, check_uniform, prove
from tpx.plan.values import Bias, Value, adds_nothing

MADE = make_config(num_local_experts=4, num_hidden_layers=2)
FAMILY = family_of(MADE)
SPEC = FAMILY.spec(MADE)
LAYOUT = FAMILY.layout(SPEC)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return CheckpointIndex.open(write_folder(tmp_path_factory.mktemp("headers"), MADE))


def resolved(index, name, phase="prefill", dispatch=None):
    """-> (held, flow, sent) of a shipped plan."""
    plan = load_plan(shipped_plans("gpt_oss")[name], f"{name}.yaml")
    held = hold(plan, LAYOUT, index, assign(plan, LAYOUT))
    dispatch = dispatch or getattr(choose_dispatch(plan), phase)
    lists = [FAMILY.collectives(SPEC, plan.mesh, cuts, dispatch) for cuts in held.cuts]
    return held, FAMILY.flow(SPEC, dispatch), Sent(dispatch, lists)


def refused(held, flow, sent) -> PlanError:
    with pytest.raises(PlanError) as error:
        check_flow(held, flow, sent)
    assert error.value.code.startswith(("P2", "P3"))
    return error.value


NAMES = [name for name in shipped_plans("gpt_oss") if name != "tp1"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", NAMES)
def test_every_collective_is_needed_once_over_its_own_group(index, name, phase):
    """What a collective does is typed: without it, twice, or over another group it is refused."""
    held, flow, sent = resolved(index, name, phase)
    assert check_flow(held, flow, sent)[0] > 0
    groups = {group: held.plan.mesh.groups(group) for group in (*AXES, "expert", "slice", "gather")}
    for i, one in enumerate(sent.collectives[0]):

        def changed(make, i=i):
            return Sent(sent.name, [(*c[:i], *make(c[i]), *c[i + 1 :]) for c in sent.collectives])

        refused(held, flow, changed(lambda c: ()))
        refused(held, flow, changed(lambda c: (c, c)))
        for group, ranks in groups.items():
            if ranks != groups[one.group] and one.name != "moe.counts":
                other = changed(lambda c, g=group: (c._replace(group=g),))
                refused(held, flow, other)


def with_shards(held, change):
    """change(rank, name, shard) -> shard."""
    shards = [
        {name: change(rank, name, shard) for name, shard in mine.items()}
        for rank, mine in enumerate(held.shards)
    ]
    return held._replace(shards=shards)


def ending(end, **values):
    return lambda rank, name, shard: replace(shard, **values) if name.endswith(end) else shard


def test_a_bias_on_partial_sums_is_added_by_exactly_one_rank(index):
    held, flow, sent = resolved(index, "tp2-etp2")
    error = refused(with_shards(held, ending("down_proj_bias", add_once=False)), flow, sent)
    assert (error.code, error.hint) == ("P310", HINT)
    assert error.message == (
        "plan `tp2-etp2.yaml`, line 12: `model.layers.*.mlp.experts.down_proj_bias`: the bias is "
        "added 2 times by `moe.combine` (dispatch replicated)"
    )
    held, flow, sent = resolved(index, "tp2-ep2")
    error = refused(with_shards(held, ending("sinks", ranges=(((0, 8),),))), flow, sent)
    assert error.message == (
        "plan `tp2-ep2.yaml`, line 9: `model.layers.*.self_attn.sinks`: it is cut unlike the query "
        "heads"
    )


CUT_WRONG = {  # plan, what is held whole or cut elsewhere, its ranges, the code
    "scales whole": ("tp2-ep2", "gate_up_proj_scales", (((0, 4),), ((0, 192),), ((0, 2),)), "P311"),
    "keys of other heads": ("tp4-ep4", "k_proj.weight", (((0, 16),), ((0, 64),)), "P311"),
    "o_proj whole": ("tp2", "o_proj.weight", (((0, 64),), ((0, 128),)), "P311"),
    "a bias whole": ("tp2", "q_proj.bias", (((0, 128),),), "P311"),
    "gate without up": ("tp2-etp2", "gate_up_proj_bias", (((0, 4),), ((0, 1),)), "P205"),
    "a norm in part": ("tp2", "post_attention_layernorm.weight", (((0, 32),),), "P205"),
    "the head's rows elsewhere": ("tp2", "lm_head.weight", (((0, 66),), ((0, 64),)), "P311"),
    "the same experts everywhere": (
        "ep2", "gate_up_proj_bias", (((0, 2),), ((0, 192),)), "P311"),
    "the same rows of the embedding": ("tp2", "embed_tokens.weight", (((0, 66),), ((0, 64),)),
                                       "P309"),
}  # fmt: skip


@pytest.mark.parametrize("case", CUT_WRONG)
def test_what_meets_is_cut_alike(index, case):
    name, end, ranges, code = CUT_WRONG[case]
    held, flow, sent = resolved(index, name)
    broken = with_shards(
        held, lambda rank, n, shard: replace(shard, ranges=ranges) if n.endswith(end) else shard
    )
    assert refused(broken, flow, sent).code == code


def test_query_heads_and_key_heads_of_a_rank_belong_together(index):
    """Both key and value heads of rank 2 are those of rank 0."""
    held, flow, sent = resolved(index, "tp4-ep4")
    ends = ("k_proj.bias", "v_proj.bias", "k_proj.weight", "v_proj.weight")

    def change(rank, name, shard):
        return held.shards[0][name] if rank == 2 and name.endswith(ends) else shard

    broken = with_shards(held, change)
    error = refused(broken, flow, sent)
    assert error.code == "P314"
    assert error.message == (
        "plan `tp4-ep4.yaml`, line 9: `model.layers.*.self_attn.sinks`: rank 2 holds query heads 4 "
        "to 6 and key heads 0 to 1, and 4 query heads share a key head"
    )


def without(flow: Flow, part: str, drop) -> Flow:
    kept = tuple(step for step in getattr(flow, part) if not drop(step))
    return flow._replace(**{part: kept})


STEPS = {  # plan, part, which step is gone, code, message
    "attention is never added": (
        "tp2", "layer", lambda s: s.name == "attention", "P309",
        "`model.layers.*.self_attn.o_proj.weight`: a sum over num_attention_heads is added up in "
        "part only before `add` takes it as `h` (dispatch local)",
    ),
    "logits are never gathered": (
        "tp2", "after", lambda s: s.op == "meet", "P313",
        "`logits` needs whole rows, and they are cut over vocab_size",
    ),
    "experts are never weighed": (
        "ep2", "layer", lambda s: s.op == "weigh", "P310", None),
    "tokens are not cut in slices": (
        "dp2-tp2-ep4", "layer", lambda s: s.op == "slice" and s.name == "slice", None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_is_missing_is_refused(index, case):
    name, part, drop, code, message = STEPS[case]
    held, flow, sent = resolved(index, name)
    flow = without(flow, part, drop)
    if case == "experts are never weighed":  # the collective then adds rows, not sums
        flow = flow._replace(layer=tuple(
            s._replace(inputs=("h", "y")) if s == flow.layer[-1] else s for s in flow.layer
            if s.name != "moe.combine"))  # fmt: skip
    error = refused(held, flow, sent)
    assert code is None or error.code == code
    assert message is None or error.message.endswith(message)


def test_nothing_that_is_not_linear_takes_a_partial_sum(index):
    held, flow, sent = resolved(index, "tp2-etp2")
    at = next(i for i, s in enumerate(flow.layer) if s.along == "I")
    squashed = (*flow.layer[: at + 1], Step("elementwise", "y", ("y",)), *flow.layer[at + 1 :])
    error = refused(held, flow._replace(layer=squashed), sent)
    assert error.code == "P309"
    assert "a sum over intermediate_size is added up in part only before `elementwise`" in (
        error.message
    )


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [("dp2-ep2", "replicated"), ("dp2-tp2-ep4", "replicated"), ("dp2-tp2-ep4", "local")],
)
def test_a_dispatch_that_adds_sums_of_different_tokens_is_refused(index, name, dispatch):
    held, flow, sent = resolved(index, name, dispatch=dispatch)
    assert refused(held, flow, sent).code == ("P312" if dispatch == "replicated" else "P309")


def test_a_collective_that_no_step_takes_is_refused(index):
    held, flow, sent = resolved(index, "tp2")
    extra = sent.collectives[0][0]._replace(name="again", per_layer=True)
    error = refused(held, flow, Sent("local", [(*mine, extra) for mine in sent.collectives]))
    assert (error.code, error.message) == (
        "P316", "plan `tp2.yaml`: collective `again` over tp is sent, and no step takes it there"
    )  # fmt: skip


def test_ranks_that_call_different_collectives_are_refused(index):
    held, _, sent = resolved(index, "tp2")
    with pytest.raises(PlanError) as error:
        check_uniform(held.plan, [sent.collectives[0], sent.collectives[1][:-1]])
    assert (error.value.code, error.value.message) == (
        "P317", "plan `tp2.yaml`: ranks 0 and 1 call different collectives"
    )  # fmt: skip


def test_tied_parameters_are_cut_alike(tmp_path):
    made = make_config(tie_word_embeddings=True)
    spec = FAMILY.spec(made)
    layout = FAMILY.layout(spec)
    index = CheckpointIndex.open(write_folder(tmp_path, made))
    plan = parse_plan(plan_text(), "p.yaml")
    held = hold(plan, layout, index, assign(plan, layout))
    assert check_tied(held) == 1
    whole = ending("lm_head.weight", ranges=(((0, 131),), ((0, 64),)))
    with pytest.raises(PlanError) as error:
        check_tied(with_shards(held, whole))
    assert (error.value.code, error.value.message) == (
        "P315",
        "plan `p.yaml`: rank 0 cuts `lm_head.weight` unlike `model.embed_tokens.weight`, whose "
        "storage it shares",
    )


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12])
def test_every_dispatch_that_a_mesh_allows_is_typed(tmp_path, world):
    """No mesh and no dispatch that planning accepts is refused by the flow."""
    made = make_config(num_attention_heads=48, num_key_value_heads=12, head_dim=2,
                       num_local_experts=24, num_hidden_layers=1)  # fmt: skip
    index = CheckpointIndex.open(write_folder(tmp_path, made))
    spec, typed = FAMILY.spec(made), 0
    for mesh in meshes(world):
        shown = ", ".join(f"{axis}: {getattr(mesh, axis)}" for axis in AXES)
        for word in ("auto", "replicated", "gather", "all_to_all"):
            rule = f"{{style: expert, uneven: true, dispatch: {word}}}"
            plan = parse_plan(plan_text(f"{{{shown}}}", **{"mlp.experts": rule}), "p.yaml")
            try:
                prove(plan, spec, FAMILY.layout(spec), index, world, FAMILY)
            except PlanError as error:
                refusal = error.code
                if refusal not in ("P406", "P307", "P201"):
                    raise
            else:
                typed += 1
    assert typed > 0


@pytest.mark.parametrize(
    ("mesh", "seconds"),
    [("{tp: 8, ep: 8}", 0.2), ("{dp: 128, tp: 8, ep: 128, etp: 8}", 4.0)],
)
def test_all_proofs_of_120b_take_little_time(tmp_path, mesh, seconds):
    made = make_config(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=128,
        num_experts_per_tok=4,
    )  # fmt: skip
    index = CheckpointIndex.open(write_folder(tmp_path, made))
    spec = FAMILY.spec(made)
    layout = FAMILY.layout(spec)
    rule = "{style: expert, uneven: true}"
    plan = parse_plan(plan_text(mesh, **{"mlp.experts": rule}), "p.yaml")
    gc.collect()  # the suite's own garbage is not the proofs' work
    begin = time.process_time()
    assert prove(plan, spec, layout, index, plan.mesh.world, FAMILY)
    assert time.process_time() - begin < seconds


@pytest.mark.parametrize(
    ("zeros", "changes"),
    [
        (True, {}),
        (False, {"boxes": (((0, 1), (32, 32)), ((0, 1), (31, 32)))}),
        (False, {"biases": (Bias("down_proj_bias", (("E", (0, 1)),), True),)}),
        (True, {"biases": (Bias("down_proj_bias", (("E", (0, 1)),), False),)}),
        (False, {"over": (), "boxes": ()}),
    ],
)
def test_a_sum_over_no_units_that_adds_no_bias_is_zeros(zeros, changes):
    value = Value((), ((0, 0, 1),), over=("E", "I"), boxes=(((0, 1), (32, 32)),))
    assert adds_nothing(value._replace(**changes)) == zeros
