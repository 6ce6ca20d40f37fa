"""`tpx verify`: equal plans are equal on real ranks, and a planted fault is found where it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from ranks import ranks
from tiny import tiny_checkpoint, tiny_config

from tpx.batch import FULL
from tpx.blame import State, blame, errors_of
from tpx.narrow import make_batch
from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan
from tpx.plan.prepare import prepare
from tpx.trial import Fault, Trial, Verdict, make_trial
from tpx.verify import deal, verify

GIB = 1 << 30
PLANS = {name: load_plan(path).mesh.world for name, path in shipped_plans("gpt_oss").items()}
IDS = (5, 9, 120, 7, 3, 2, 64, 65, 66, 67, 130, 200)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def verdicts(folder: str, plans: list[str], trial: Trial) -> list[Verdict | None]:
    """Of each plan; run on every rank."""
    return [verify(trial, folder, plan, "cpu") for plan in plans]


@pytest.mark.parametrize(
    "plans",
    [
        [name for name, world in PLANS.items() if world == 2],
        ["tp4-ep2-etp2", "dp2-tp2-ep2-etp2"],
        pytest.param([n for n, world in PLANS.items() if world == 4], marks=pytest.mark.more),
    ],
    ids=["2 ranks", "4 ranks", "all of 4 ranks"],
)
def test_shipped_plans_are_equal(tiny, plans):
    world = PLANS[plans[0]]
    first, *others = ranks(world).run(verdicts, str(tiny), plans, Trial(IDS, None, GIB))
    assert all(verdict is None for told in others for verdict in told)
    for plan, verdict in zip(plans, first, strict=True):
        assert verdict.fault is None, plan
        assert 0 <= verdict.error < 1e-5
        dp = load_plan(shipped_plans("gpt_oss")[plan]).mesh.dp
        assert verdict.tokens == (12, 11)[:dp]
        # embedding, five outputs in each of two layers, norm, head; to prefill and to decode
        assert verdict.compared == world * 2 * (1 + 2 * 5 + 2)
        assert (verdict.layers, verdict.hidden, verdict.random) == (2, 64, False)


# Where it is planted: (parameter, rank) -> (layer, module, name).
FAULTS = {
    ("model.embed_tokens.weight", 1): (None, "embedding", "model.embed_tokens"),
    ("model.layers.0.input_layernorm.weight", 1): (0, "norm", "model.layers.0.input_layernorm"),
    ("model.layers.1.self_attn.o_proj.weight", 0): (1, "attention", "model.layers.1.self_attn"),
    ("model.layers.0.self_attn.sinks", 1): (0, "attention", "model.layers.0.self_attn"),
    ("model.layers.1.mlp.router.weight", 1): (1, "router", "model.layers.1.mlp.router"),
    ("model.layers.1.mlp.experts.gate_up_proj_scales", 1): (1, "experts", "model.layers.1.mlp"),
    ("model.layers.1.mlp.experts.down_proj_bias", 0): (1, "experts", "model.layers.1.mlp"),
    ("model.norm.weight", 0): (None, "norm", "model.norm"),
    ("lm_head.weight", 1): (None, "head", "lm_head"),
}


def planted(folder: str, plan: str) -> list[Verdict | None]:
    """A verdict for each of FAULTS; run on every rank."""
    found = []
    for name, on in FAULTS:

        def perturb(model: torch.nn.Module, rank: int, name: str = name, on: int = on) -> None:
            parameter = model.get_parameter(name)
            if rank == on and parameter.dtype == torch.uint8:
                parameter.add_(1)  # of scales: their values are doubled
            elif rank == on:
                parameter.add_(torch.linspace(0, 2, parameter.numel()).view_as(parameter))

        found.append(verify(Trial(IDS, None, GIB), folder, plan, "cpu", perturb))
    return found


@pytest.mark.parametrize("plan", ["tp2-ep2", "dp2-ep2"])
def test_a_planted_fault_is_named(tiny, plan):
    first, _ = ranks(2).run(planted, str(tiny), plan)
    for ((parameter, on), expected), verdict in zip(FAULTS.items(), first, strict=True):
        fault = verdict.fault
        assert fault is not None, parameter
        assert (fault.layer, fault.module, fault.name) == expected, parameter
        assert (fault.phase, fault.tie) == ("prefill", False)
        assert fault.error > 1e-3
        assert verdict.error > 1e-3
        if expected[1] in ("norm", "router") or (plan == "dp2-ep2" and expected[1] != "experts"):
            assert fault.ranks == (on,)  # what a rank computes for itself
        else:
            assert on in fault.ranks


def damaged(folder: str) -> list[Verdict | None]:
    """Values that are no numbers, and a fault that only decoding sees; run on every rank."""

    def spoil(model: torch.nn.Module, rank: int) -> None:
        model.get_parameter("model.layers.0.self_attn.o_proj.bias")[0] = math.nan

    def wrong_once_decoding(model: torch.nn.Module, rank: int) -> None:
        dispatch = model.get_submodule("model.layers.1.mlp").decode
        dispatch.expert = Doubling(dispatch.expert)

    trial = Trial(IDS, None, GIB)
    return [verify(trial, folder, "ep2", "cpu", how) for how in (spoil, wrong_once_decoding)]


class Doubling:
    """An expert group whose sum is twice too large."""

    def __init__(self, group):
        self.group, self.copy = group, group.copy

    def all_reduce(self, x, name):
        return self.group.all_reduce(x, name) * 2


def test_no_numbers_and_faults_of_decoding_are_found(tiny):
    spoilt, doubled = ranks(2).run(damaged, str(tiny))[0]
    assert spoilt.fault[:4] == ("prefill", 0, "attention", "model.layers.0.self_attn")
    assert spoilt.error == spoilt.fault.error == math.inf
    assert doubled.fault[:5] == ("decode", 1, "experts", "model.layers.1.mlp", (0, 1))
    assert doubled.fault.error == pytest.approx(1, rel=1e-4)  # the residual is taken off again


def test_the_first_layers_or_random_weights_stand_for_a_large_model(tmp_path):
    config = tiny_config(num_hidden_layers=6, num_local_experts=8)
    folder = make_checkpoint(tmp_path / "six", config)
    trials = [Trial(IDS, 2, GIB), Trial(IDS, None, 1000), Trial(IDS, 3, 1000)]
    for trial, layers in zip(trials, (2, 4, 3), strict=True):
        verdict = ranks(2).run(verdicts, str(folder), ["dp2-ep2"], trial)[0][0]
        assert verdict.fault is None
        assert (verdict.layers, verdict.random) == (layers, trial.max_bytes == 1000)
        assert verdict.stored > 100_000
        assert verdict.compared > 0
        assert verdict.error < 1e-5


def test_a_router_that_chooses_otherwise_between_equal_logits_is_a_tie():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    other = logits + torch.tensor([[0.0, 0, 0, 1e-7], [0, 0, 0, 0]]) * 2
    out = torch.ones(2, 4)
    expected = [State("prefill", "router", "model.layers.7.mlp.router", logits, 2)]
    expected.append(State("prefill", "experts", "model.layers.7.mlp", out))
    states = [expected[0]._replace(value=other), expected[1]._replace(value=out * 2)]
    errors = errors_of(states, [state.value for state in expected])
    assert blame(states, [errors]) == Fault(
        "prefill", 7, "router", "model.layers.7.mlp.router", (0,), 1.0, True
    )
    same = errors_of([expected[0], states[1]], [state.value for state in expected])
    assert blame(states, [same]) == Fault("prefill", 7, "experts", "model.layers.7.mlp", (0,), 1.0)
    assert blame(states, [[(0.0, False)] * 2]) is None


def test_prompts_of_dp_groups_differ_in_length_and_tokens():
    assert deal((1, 2, 3, 4), 3) == [[1, 2, 3, 4], [2, 3, 4], [3, 4]]
    assert deal((7,), 3) == [[7], [7], [7]]


def test_a_batch_by_hand_has_its_own_pages():
    batch = make_batch([[4, 5], [6]], 15)
    assert batch.ids_T.tolist() == [4, 5, 6]
    assert batch.positions_T.tolist() == [15, 16, 15]
    assert batch.slots_T[FULL].tolist() == [15, 16, 32 + 15]
    assert batch.tables_BN[FULL].tolist() == [[0, 1], [2, -1]]
    assert (batch.lengths_B.tolist(), batch.starts_B.tolist()) == ([17, 16], [0, 2, 3])
    assert (batch.logits_at.tolist(), batch.longest, batch.decode) == ([1, 2], 3, True)


def test_a_verdict_travels_as_json():
    fault = Fault("decode", None, "head", "lm_head", (0, 2), math.inf)
    for one in (None, fault):
        verdict = Verdict(0.5, one, 52, (12, 11), 2, 64, 1000, True)
        assert Verdict.from_json(verdict.to_json()) == verdict


def test_a_trial_without_a_prompt_has_ids_inside_the_vocabulary(tiny):
    prepared = prepare(tiny, "tp2", 2)
    ids = make_trial(prepared, None, None, GIB).ids
    assert len(ids) == len(set(ids)) == 24
    assert max(ids) < 263
    assert make_trial(prepared, "the end", 1, 7) == Trial((257, 220, 260), 1, 7)
