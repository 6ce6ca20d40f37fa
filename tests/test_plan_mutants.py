"""A mutation score: what the checker says of every single edit of every plan, against real runs.

Gates: no plan that runs wrongly, or that has no meaning, is accepted; none that runs rightly is
called unsound. `make mutants` writes the table of all edits into docs/plans.md.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from headers import write_folder
from mutants import CHECKPOINTS, SLIPPED, Verdict, judge, make, mutants
from oracle import Oracle, open_model

from tpx.errors import PlanError
from tpx.families.steps import Cut
from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan
from tpx.plan.resolve import resolve
from tpx.plan.types import Rule

PLANS = {name: load_plan(path) for name, path in shipped_plans("gpt_oss").items()}
ALL = {mutant.name: mutant for name, plan in PLANS.items() for mutant in mutants(plan, name)}
SAMPLE = 300


@pytest.fixture(scope="module", params=CHECKPOINTS)
def oracle(request, tmp_path_factory):
    return Oracle(make(tmp_path_factory.mktemp(request.param), request.param))


def faults(oracle: Oracle, names) -> list[str]:
    """In order of world, so that a pool of ranks is used before the next is started."""
    found = []
    for name in sorted(names, key=lambda name: (PLANS[name[0]].mesh.world, name)):
        verdict = judge(ALL[name], PLANS[name[0]].mesh.world, oracle)
        if verdict.fault:
            found.append(f"{name}: {verdict}")
    return found


def test_a_single_edit_has_a_name_of_its_own():
    assert len(ALL) == sum(len(mutants(plan, name)) for name, plan in PLANS.items())
    kinds = {kind for _, kind, _ in ALL}
    assert len(kinds) == 8
    assert {name for name, *_ in ALL} == PLANS.keys()


def test_a_verdict_that_breaks_a_gate_says_which():
    assert Verdict("accepted", "", "wrong", "").fault == "accepted, but wrong"
    assert Verdict("accepted", "", "no meaning", "").fault == "accepted, but no meaning"
    assert Verdict("unsound", "", "right", "").fault == "called unsound, but right"
    assert Verdict("unclear", "", "right", "").fault is None
    assert Verdict("unclear", "", "wrong", "").fault is None


@pytest.mark.more
def test_the_oracle_tells_right_from_wrong(oracle):
    """Shipped plans run rightly; an edit of each sort does not."""
    for name in ("tp1", "tp2", "dp2-ep2", "tp2-etp2", "tp2-ep2"):
        assert oracle.run(PLANS[name]) == ("right", ""), name
    whole = "model.layers.*.mlp.experts: expert -> replicate"
    for name, kind, edit in (
        ("dp2-ep2", "style swapped", whole),
        ("tp2-etp2", "style swapped", whole),
        ("tp2-ep2", "style swapped", "model.layers.*.self_attn.sinks: colwise -> replicate"),
        ("dp2-ep2", "dispatch swapped", "all_to_all -> replicated"),
    ):
        assert judge(ALL[name, kind, edit], 2, oracle).oracle == "wrong", (name, edit)


@pytest.mark.more
def test_no_sampled_edit_breaks_a_gate(oracle):
    names = random.Random(20).sample(sorted(ALL), SAMPLE)
    assert faults(oracle, {*names, *SLIPPED}) == []


def test_without_proofs_a_wrong_plan_is_taken_at_its_word(tmp_path):
    """What the oracle of mutants runs; a parameter without a rule is still an error."""
    made = open_model(write_folder(tmp_path))
    spec, layout, index = made.spec, made.layout, made.index
    plan = PLANS["tp2-ep2"]
    name = "model.layers.0.self_attn.o_proj.weight"
    wrong = [replace(r, style="colwise") if "o_proj" in r.pattern else r for r in plan.rules]
    dispatched = [replace(r, dispatch="gather") if r.style == "expert" else r for r in wrong]
    taken = replace(plan, rules=(*dispatched, Rule("lm_head", "replicate", 0)))
    with pytest.raises(PlanError):
        resolve(taken, spec, layout, index, 1)
    found = resolve(taken, spec, layout, index, 1, prove=False)
    assert found.shards[name].shape == (64, 128)  # `colwise` cuts nothing of it
    assert found.cuts["Q"] == Cut("tp", 4, 8)
    assert found.dispatch == ("gather", "gather")
    assert found.shards["lm_head.weight"].shape == (65, 64)  # the first rule wins
    missing = replace(plan, rules=plan.rules[1:])
    with pytest.raises(PlanError) as error:
        resolve(missing, spec, layout, index, 1, prove=False)
    assert error.value.code == "P101"
