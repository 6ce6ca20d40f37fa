"""engine/engine.py: who draws, who is told, and ranks that step along with nothing to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from tiny import tiny_checkpoint

import tpx
from tpx import SamplingParams
from tpx.engine.batch import make_batch, wanted
from tpx.engine.request import Request
from tpx.engine.scheduler import Chunk, Limits
from tpx.engine.start import Wanted, largest_step, limits_of

PARAMS = SamplingParams(temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engine"))


class Disturbed(torch.nn.Module):
    """A model whose logits are wrong on every rank but 0."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> torch.Tensor:
        return self.model(*args) * (1 if os.environ["RANK"] == "0" else -1)


def disturbed(folder: Path) -> Any:
    with tpx.LLM(folder, "tp2", dtype="float32", device="cpu") as llm:
        right = llm.generate([[1, 2]], PARAMS)
        runner = llm.session.engine.runner
        runner.model = Disturbed(runner.model)
        return right, llm.generate([[1, 2]], PARAMS)


def test_one_rank_of_a_tp_group_draws_and_the_others_are_told(folder):
    for right, found in ranks(2).run(disturbed, folder):
        assert found == right


def recorded(folder: Path, plan: str, prompts: list[list[int]]) -> Any:
    with tpx.LLM(folder, plan, dtype="float32", device="cpu") as llm:
        with llm.groups.recording() as records:
            llm.generate(prompts, PARAMS)
        return [(r.name, r.op, r.group, r.shape) for r in records if r.name.startswith("engine.")]


def test_a_step_exchanges_little_and_only_between_ranks_that_differ(folder):
    told = ("engine.sample", "broadcast", "tp", (3,))
    assert ranks(2).run(recorded, folder, "tp2", [[1], [2], [3, 4]]) == [[told] * 6] * 2
    step = ("engine.step", "all_gather", "dp", (1, 8))
    for records in ranks(2).run(recorded, folder, "dp2-ep2", [[1]]):
        assert records[:7] == [step] * 7  # six tokens, and the step that finds nothing left
        assert [record[0] for record in records[7:]] == [
            "engine.results.lengths",
            "engine.results",
        ]


def test_a_batch_lays_chunks_one_after_another():
    first = Request(tuple(range(100, 140)), limit=50, output=[7], cached=40)
    first.full, first.sliding = [3, 1, 0, 9], [-1, 5, 2]
    second = Request((11, 12, 13), limit=3, all_logits=True)
    second.full, second.sliding = [4], [6]
    chunks = [Chunk(first, 40, 1), Chunk(second, 0, 3)]
    batch = make_batch(chunks, longest=4, decode=False, device=torch.device("cpu"))
    assert batch.ids_T.tolist() == [7, 11, 12, 13]
    assert batch.positions_T.tolist() == [40, 0, 1, 2]
    assert batch.starts_B.tolist() == [0, 1, 4]
    assert batch.lengths_B.tolist() == [41, 3]
    assert batch.slots_T[0].tolist() == [8, 64, 65, 66]
    assert batch.slots_T[1].tolist() == [40, 96, 97, 98]
    assert batch.tables_BN[0].tolist() == [[3, 1, 0], [4, -1, -1]]
    assert batch.tables_BN[1].tolist() == [[-1, 5, 2], [6, -1, -1]]
    assert batch.logits_at.tolist() == [0, 1, 2, 3]
    assert (batch.longest, batch.decode) == (4, False)
    kinds = {tensor.dtype for tensor in (batch.starts_B, batch.lengths_B, *batch.tables_BN)}
    assert kinds == {torch.int32}


def test_a_prompt_wants_logits_only_where_its_last_token_is():
    one = Request(tuple(range(10)), limit=20)
    assert wanted([Chunk(one, 0, 4), Chunk(one, 4, 6)]) == [9]
    assert wanted([Chunk(one, 0, 4)]) == []


def test_a_batch_of_nothing_is_a_batch():
    batch = make_batch([], longest=5, decode=True, device=torch.device("cpu"))
    shapes = [t.shape for t in (batch.ids_T, batch.starts_B, batch.tables_BN[0], batch.logits_at)]
    assert shapes == [(0,), (1,), (0, 0), (0,)]


@pytest.mark.parametrize(("context", "lengths"), [(96, [96, 4]), (30, [30, 30, 30, 10])])
def test_the_step_that_is_measured_is_full_and_draws_for_every_request(folder, context, lengths):
    with tpx.LLM(folder, "tp1", dtype="float32", device="cpu") as llm:
        limits = Limits(tokens=100, requests=9)
        batch, caches = largest_step(llm._cache, limits, context, llm.device)
        assert batch.lengths_B.tolist() == lengths
        with torch.inference_mode():
            logits = llm.session.engine.runner.model(batch, caches)
        assert logits.shape == (9, 263)
        assert logits.isfinite().all()
        # No page is two sequences'.
        assert len({*batch.slots_T[0].tolist()}) == len({*batch.slots_T[1].tolist()}) == 100


def test_a_gpus_steps_are_longer_than_a_cpus():
    wanted = Wanted(context=9216, requests=64)
    assert limits_of(wanted, torch.device("cpu")) == (512, 64)
    assert limits_of(wanted, torch.device("cuda")) == (8192, 64)
    assert limits_of(Wanted(context=4, requests=2), torch.device("cuda")) == (8, 2)
