"""A mutation score: what the checker says of every single edit of every plan, against real runs.

Gates: no plan that runs wrongly, or that has no meaning, is accepted; none that runs rightly is
called unsound. `make mutants` writes the table of all edits into docs/plans.md.
"""

from __future__ import annotations

import random

import pytest
from mutants import CHECKPOINTS, SLIPPED, Verdict, judge, make, mutants
from oracle import Oracle

from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan

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
