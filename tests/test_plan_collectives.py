"""What a plan predicts and what a run records: the same collectives, in order, and their bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from parity import build
from ranks import ranks

import tpx
from tpx.families.steps import Collective
from tpx.plan.find import plans_for_world
from tpx.plan.prepare import Prepared, prepare
from tpx.record import Record
from tpx.split import split

TOKENS = 12  # of each dp group's prompt
ROUTED = (
    "moe.tokens",
    "moe.ids",
    "moe.weights",
    "moe.etp",
    "moe.return",
)  # rows as routing decides
PLANS = [(name, world) for world in (1, 2, 4) for name in plans_for_world("gpt_oss", world)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(build(tmp_path_factory.mktemp("collectives") / "7-blocks", "7-blocks"))


def recorded(folder: str, plan: str, dp: int) -> list[Record]:
    """The model's collectives of one prefill and one decode step: run on every rank."""
    params = tpx.SamplingParams(max_tokens=2, ignore_eos=True)
    with tpx.LLM(folder, tp_plan=plan, dtype="float32", device="cpu") as llm:
        with llm.groups.recording() as records:
            llm.generate([list(range(2, 2 + TOKENS))] * dp, params)
        return [r for r in records if r.name.partition(".")[0] not in ("engine", "check")]


def predicted(prepared: Prepared, rank: int, phase: str) -> list[Collective]:
    """Of one forward: those of a layer as often as there are layers."""
    mine = prepared.rank_plan(rank)
    spec = replace(prepared.spec, dtype="float32")
    steps = prepared.family.collectives(spec, mine.mesh, mine.cuts, getattr(mine.dispatch, phase))
    before = [s for s in steps if not s.per_layer and s.name != "head"]
    layer = [s for s in steps if s.per_layer]
    after = [s for s in steps if s.name == "head"]
    return [*before, *layer * spec.num_hidden_layers, *after]


def said(step: Any) -> tuple[str, str, str]:
    return step.name, step.op, step.group


def slice_of(prepared: Prepared, rank: int, tokens: int) -> int:
    """Of a tp group's tokens, how many this rank takes."""
    mesh = prepared.plan.mesh
    slices = split(tokens, mesh.tp // mesh.etp)
    start, stop = slices[mesh.coords(rank).tp // mesh.etp]
    return stop - start


@pytest.mark.parametrize(("name", "world"), PLANS)
def test_a_run_records_the_collectives_that_its_plan_predicts(checkpoint, name, world):
    prepared = prepare(checkpoint, name, world)
    found = ranks(world).run(recorded, checkpoint, name, prepared.plan.mesh.dp)
    for rank, records in enumerate(found):
        prefill = predicted(prepared, rank, "prefill")
        decode = predicted(prepared, rank, "decode")
        assert [said(r) for r in records] == [said(s) for s in (*prefill, *decode)]
        tokens = [TOKENS] * len(prefill) + [1] * len(decode)
        for step, record, mine in zip((*prefill, *decode), records, tokens, strict=True):
            times = 1 if step.name == "head" or not step.per_token else mine
            if step.name == "moe.slices":  # predicted on average: a tp group's tokens, dealt out
                times = len(prepared.plan.mesh.group("slice", rank)) * slice_of(
                    prepared, rank, mine
                )
            if step.name not in ROUTED:
                assert record.nbytes == times * step.nbytes, f"{rank=} {step} {record}"


def test_rows_that_routing_decides_are_predicted_on_average(tmp_path):
    """2 of 8 experts over 2 ranks: a token goes to 11/7 ranks if all choices are as likely."""
    folder = str(build(tmp_path / "3-blocks", "3-blocks"))
    prepared = prepare(folder, "dp2-ep2", 2)
    [step] = {s for s in predicted(prepared, 0, "prefill") if s.name == "moe.tokens"}
    assert step.elements == pytest.approx(11 / 7 * prepared.spec.hidden_size)
    found = ranks(2).run(recorded, folder, "dp2-ep2", 2)
    calls = [[r.nbytes for r in records if r.name == "moe.tokens"] for records in found]
    prefill = [n for sent in calls for n in sent[: prepared.spec.num_hidden_layers]]
    assert sum(prefill) / len(prefill) == pytest.approx(TOKENS * step.nbytes, rel=0.2)
