"""tpx against transformers: every shipped plan at its own world, at sizes it does not divide."""

from __future__ import annotations

import numpy as np
import pytest
from parity import (
    CONFIGS,
    DEMO,
    TOLERANCE,
    Answer,
    answer,
    build,
    compare,
    drawn_config,
    fits,
    one_prompt,
    prompts,
    reference,
    relative_error,
    write,
)
from ranks import ranks

from tpx.config import read_config
from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan

MESHES = {name: load_plan(path).mesh for name, path in shipped_plans("gpt_oss").items()}
MOST_RANKS = {"3-blocks": 4, "7-blocks": 2}  # on every commit; the rest is in `make test-more`
DRAWN, DRAWN_IN_CI = 200, 15  # sizes drawn for `make soak`; the first of them for `make test-more`
DP_PLANS = sorted(name for name, mesh in MESHES.items() if mesh.dp > 1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp(name), name) for name in CONFIGS}


def cases():
    """Every (plan, config) whose experts the plan's ep divides."""
    for plan, mesh in sorted(MESHES.items()):
        for name, (config, _, _) in CONFIGS.items():
            if fits(config, mesh):
                marks = () if mesh.world <= MOST_RANKS.get(name, 0) else (pytest.mark.more,)
                yield pytest.param(plan, name, id=f"{plan}-{name}", marks=marks)


@pytest.mark.parametrize(("plan", "name"), list(cases()))
def test_logits_and_greedy_tokens_equal_transformers(plan, name, checkpoints):
    theirs = reference(checkpoints[name])
    vocab = CONFIGS[name][0]["vocab_size"]
    for ours in ranks(MESHES[plan].world).run(answer, str(checkpoints[name]), plan, vocab):
        compare(ours, theirs)


def drawn_cases():
    """Sizes drawn by a seed, each at one shipped plan that can cut them, the plans in turn."""
    plans = sorted(MESHES)
    for seed in range(DRAWN):
        config = drawn_config(seed)[0]
        feasible = [name for name in plans if fits(config, MESHES[name])]
        mark = pytest.mark.more if seed < DRAWN_IN_CI else pytest.mark.soak
        yield pytest.param(seed, feasible[seed % len(feasible)], marks=mark)


@pytest.mark.parametrize(("seed", "plan"), list(drawn_cases()))
def test_drawn_sizes_equal_transformers(seed, plan, tmp_path):
    described = drawn_config(seed)
    folder = write(tmp_path, described, seed)
    theirs = reference(folder, greedy=16)
    vocab = described[0]["vocab_size"]
    for ours in ranks(MESHES[plan].world).run(answer, str(folder), plan, vocab, 16):
        compare(ours, theirs)


@pytest.mark.parametrize("plan", DP_PLANS)
def test_fewer_prompts_than_dp_groups(plan, checkpoints):
    folder = checkpoints["3-blocks"]
    ids = prompts(CONFIGS["3-blocks"][0]["vocab_size"])[2]
    for ours in ranks(MESHES[plan].world).run(one_prompt, str(folder), plan, ids):
        assert relative_error(ours, reference(folder).logits[2]) <= TOLERANCE


@pytest.mark.parametrize("plan", ["tp1", "tp2-etp2", "dp2-tp2-ep2-etp2"])
def test_the_demo_checkpoint_answers_as_in_transformers(plan):
    theirs = reference(DEMO, greedy=16)
    vocab = read_config(DEMO)["vocab_size"]
    for ours in ranks(MESHES[plan].world).run(answer, str(DEMO), plan, vocab, 16):
        compare(ours, theirs)


def test_the_comparison_can_fail():
    right = Answer([np.ones((1, 4), np.float32)], [[1, 2]])
    compare(right, right)
    with pytest.raises(AssertionError):
        compare(right, Answer([np.full((1, 4), 1.001, np.float32)], [[1, 2]]))
    with pytest.raises(AssertionError):
        compare(right, Answer([np.ones((1, 4), np.float32)], [[1, 3]]))
