"""Hugging Face's form out and in again: exact where it can say a plan, every reason where not."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from headers import layout_of, make_config
from ranks import ranks

from tpx.errors import PlanError
from tpx.plan.cuts import assign
from tpx.plan.find import read_plan, shipped_plans
from tpx.plan.hf import from_hf
from tpx.plan.hf_export import to_hf
from tpx.plan.hf_form import DISPATCH
from tpx.plan.load import parse_plan
from tpx.plan.types import Plan

CONFIG = make_config(num_key_value_heads=8, vocab_size=128)
LAYOUT = layout_of(CONFIG)
NO_EQUAL = "has no equal in Hugging Face's form: "
REFUSED = {
    "dp2-ep2": ["dp 2", "ep 2 beside tp 1"],
    "dp2-ep2-gather": ["dp 2", "ep 2 beside tp 1", "dispatch `gather`"],
    "dp2-tp2-edp2-ep2": ["dp 2"],
    "dp2-tp2-ep2-etp2": ["dp 2", "etp 2"],
    "dp2-tp2-ep4": ["dp 2", "ep 4 beside tp 2"],
    "tp2-etp2": ["etp 2"],
    "tp4-ep2-etp2": ["etp 2", "ep 2 beside tp 4"],
    "tp4-etp4": ["etp 4"],
}
SAID = sorted(shipped_plans("gpt_oss").keys() - REFUSED.keys())


def meaning(plan: Plan, layout=LAYOUT) -> object:
    """All that a plan says of a model, whatever its lines look like."""
    rules = {
        name: (r.style, r.dispatch, r.uneven) for name, r in assign(plan, layout).rule_of.items()
    }
    return plan.model, plan.mesh, rules, plan.limits


def there_and_back(plan: Plan, layout=LAYOUT) -> tuple[Plan, tuple[str, ...]]:
    form, _ = to_hf(plan, layout)
    assert form.tp_size is not None
    return from_hf(form.tp_plan, layout, plan.model, form.tp_size, form.ep_plan,
                   DISPATCH[form.ep_implementation])  # fmt: skip


def test_the_shipped_plans_that_it_can_say():
    assert SAID == ["ep2", "ep4", "tp1", "tp2", "tp2-ep2", "tp4", "tp4-ep4"]


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("changes", [{}, {"quantization_config": None},
                                     {"tie_word_embeddings": True}], ids=str)  # fmt: skip
def test_a_plan_that_it_can_say_comes_back_the_same(name, changes):
    layout = layout_of(CONFIG | changes if None not in changes.values() else
                       {k: v for k, v in CONFIG.items() if k not in changes})  # fmt: skip
    plan = read_plan(name, "gpt_oss")
    again, notes = there_and_back(plan, layout)
    assert meaning(again, layout) == meaning(plan, layout)
    assert notes == ()  # nothing is left unsaid


@pytest.mark.parametrize("word", ["replicated", "all_to_all", "auto"])
def test_a_dispatch_comes_back(word):
    text = shipped_plans("gpt_oss")["tp2-ep2"].read_text()
    text = re.sub(r"(experts: +)expert", rf"\1{{style: expert, dispatch: {word}}}", text)
    plan = parse_plan(text, "mine.yaml")
    assert meaning(there_and_back(plan)[0]) == meaning(plan)
    assert to_hf(plan, LAYOUT)[0].ep_implementation == {v: k for k, v in DISPATCH.items()}[word]


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_it_cannot_say_is_refused_with_every_reason(name):
    with pytest.raises(PlanError) as error:
        to_hf(read_plan(name, "gpt_oss"), LAYOUT)
    start, _, reasons = error.value.message.partition(NO_EQUAL)
    assert start == f"plan `plans/gpt_oss/{name}.yaml` "
    assert [reason.partition(" (")[0] for reason in reasons.split("; ")] == REFUSED[name]
    assert error.value.hint == (
        "transformers 5.23 cuts over one axis: use a plan whose mesh is tp, or tp and an ep of "
        "the same size"
    )


def test_the_reasons_have_the_plans_numbers():
    with pytest.raises(PlanError) as error:
        to_hf(read_plan("tp4-ep2-etp2", "gpt_oss"), layout_of(make_config()))
    assert error.value.message == (
        f"plan `plans/gpt_oss/tp4-ep2-etp2.yaml` {NO_EQUAL}"
        "etp 2 (no style cuts the inside of an interleaved expert unevenly, on MXFP4 blocks); "
        "ep 2 beside tp 4 (experts go over all ranks of tp); "
        "num_key_value_heads 2 over tp 4 (a key head that several ranks hold)"
    )
    with pytest.raises(PlanError) as error:
        to_hf(read_plan("dp2-ep2-gather", "gpt_oss"), LAYOUT)
    assert error.value.message.partition(NO_EQUAL)[2] == (
        "dp 2 (ranks that serve different tokens hold whole copies there only under FSDP, which "
        "shards them); ep 2 beside tp 1 (experts go over all ranks of tp); "
        "dispatch `gather` (all-reduce and all-to-all are all it has)"
    )


def test_what_stays_behind_is_noted():
    text = shipped_plans("gpt_oss")["tp2"].read_text() + "limits: {memory: 80GB, batch: 2}\n"
    _, notes = to_hf(parse_plan(text, "mine.yaml"), layout_of(make_config()))
    assert notes == (
        "limits stay behind, since the form has none: memory, batch",
        "vocab_size 131 over tp 2: transformers gives the last ranks fewer rows, tpx deals them "
        "evenly",
    )


def theirs(folder: str, form: dict, ids: list[int]) -> tuple[np.ndarray, float]:
    """transformers' own logits under an exported form, and the share of the parameters that this
    rank holds; run on every rank."""
    import torch
    from parity import load_theirs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GptOssForCausalLM
        from transformers.distributed import DistributedConfig

        config, _, mesh = GptOssForCausalLM.prepare_distribute_model(DistributedConfig(**form))
        model = load_theirs(Path(folder))
        model = GptOssForCausalLM.maybe_distribute_model(model, config, mesh)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
    sizes = [(getattr(p, "_local_tensor", p).numel(), p.numel()) for p in model.parameters()]
    held, whole = map(sum, zip(*sizes, strict=True))
    return logits.numpy(), held / whole


@pytest.mark.more
def test_transformers_runs_what_is_exported(tmp_path):
    """Its own styles cut its own model, and the logits are those of the whole model."""
    import torch
    from parity import build, load_theirs

    folder = build(tmp_path / "3-blocks", "3-blocks")
    layout = layout_of(json.loads((folder / "config.json").read_text()))
    ids = list(range(3, 30))
    with torch.inference_mode():
        expected = load_theirs(folder)(torch.tensor([ids])).logits[0].numpy()
    text = shipped_plans("gpt_oss")["tp2-ep2"].read_text()
    a2a = re.sub(r"(experts: +)expert", r"\1{style: expert, dispatch: all_to_all}", text)
    plans = {name: read_plan(name, "gpt_oss") for name in ("tp2", "ep2", "tp2-ep2")}
    plans["all to all"] = parse_plan(a2a, "mine.yaml")
    for name, plan in plans.items():
        form = to_hf(plan, layout)[0].as_dict()
        for logits, share in ranks(2).run(theirs, str(folder), form, ids):
            error = np.abs(logits - expected).max() / np.abs(expected).max()
            assert error < 2e-5, name
            assert share < {"tp2": 0.95, "ep2": 0.65}.get(name, 0.55), name
    ranks(2).close()  # they have imported much, and made groups
