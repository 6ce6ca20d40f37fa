"""llm.py: what a caller gets, the same at every world, plan, batch and order."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from tiny import PARAMS, PROMPTS, changed, give_pages, open_llm, tiny_checkpoint

import tpx
from tpx import SamplingParams
from tpx.engine.blocks import window_pages

PLANS = [("tp2", 2), ("ep2", 2), ("dp2-ep2", 2), ("dp2-tp2-ep4", 4), ("dp2-tp2-edp2-ep2", 4)]
PLANS += [pytest.param(name, 4, marks=pytest.mark.more) for name in ("tp4-ep2-etp2", "tp4-etp4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> tpx.LLM:
    return open_llm(folder, "tp1")


@pytest.fixture(scope="module")
def expected(llm: tpx.LLM) -> list[tpx.Completion]:
    return llm.generate(PROMPTS, PARAMS)


def on_ranks(folder: Path, plan: str) -> tuple[list[Any], ...]:
    with open_llm(folder, plan) as llm:
        one = llm.generate(["the"], PARAMS[1])
        pieces, streamed = taken(llm.stream(PROMPTS[1], PARAMS[1]))
        assert streamed.text == "".join(pieces)
        logits = [part.numpy() for part in llm.logits([PROMPTS[2], [7]])]
        return llm.generate(PROMPTS, PARAMS), one, streamed, logits, llm.report


def taken(stream: Generator[str, None, tpx.Completion]) -> tuple[list[str], tpx.Completion]:
    """A stream's pieces, and what it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize(("plan", "world"), PLANS)
def test_the_same_seed_gives_the_same_text_at_every_world_and_plan(
    folder, llm, expected, plan, world
):
    one = llm.generate(["the"], PARAMS[1])
    logits = llm.logits([PROMPTS[2], [7]])
    answers = ranks(world).run(on_ranks, folder, plan)
    for rank, (found, single, streamed, shared, report) in enumerate(answers):
        assert found == expected, rank
        assert single == one
        assert streamed == expected[1]
        assert report == answers[0][4]
        for whole, part in zip(logits, shared, strict=True):
            assert abs(whole.numpy() - part).max() <= 2e-5 * whole.abs().max()
            assert (part == answers[0][3][len(part) != 40]).all(), "ranks differ"
    assert [line.rank for line in answers[0][4].ranks] == list(range(world))


def test_batch_and_order_change_nothing(llm, expected):
    alone = [llm.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    assert alone == expected
    assert llm.generate(PROMPTS[::-1], PARAMS[::-1]) == expected[::-1]
    assert llm.generate(PROMPTS * 2, PARAMS * 2) == expected * 2


def test_requests_that_wait_for_the_cache_give_the_same(folder, expected):
    with open_llm(folder, "tp1", context=60, batch=2) as llm:
        scheduler = llm.session.engine.scheduler
        stream = llm.stream(PROMPTS[4], PARAMS[4])
        pieces = [next(stream)]
        assert llm.generate(PROMPTS, PARAMS) == expected
        assert "".join([*pieces, *stream]) == expected[4].text
        assert scheduler.preempted == 0


@pytest.mark.parametrize("shares", [True, False])
def test_requests_that_give_way_to_older_ones_give_the_same(folder, expected, shares):
    with open_llm(folder, "tp1", prefix_cache=shares) as llm:
        give_pages(llm, full=6, sliding=40)
        found = llm.generate([*PROMPTS[4:] * 3, *PROMPTS], [*PARAMS[4:] * 3, *PARAMS])
        assert found == [*expected[4:] * 3, *expected]
        engine = llm.session.engine
        assert engine.scheduler.preempted > 0
        engine.blocks.check([])


@pytest.mark.parametrize("most", [1, 7, 33])
def test_prompts_cut_into_chunks_give_the_same(llm, expected, most):
    kept = llm.session
    give_pages(llm, 40, 40, most)
    assert llm.generate(PROMPTS, PARAMS) == expected
    llm.session.engine.blocks.check([])
    llm.session = kept


def test_the_texts_are_what_the_tokens_say(llm, expected):
    for completion in expected:
        said = [token for token in completion.token_ids if token != 262]
        decoded = llm.tokenizer.decode(said)
        assert completion.text in (decoded, decoded.removesuffix("\ufffd"))
        assert completion.finish_reason == ("stop" if 262 in completion.token_ids else "length")


def test_greedy_tokens_are_those_of_the_logits(llm):
    [found] = llm.generate([PROMPTS[4]], SamplingParams(max_tokens=50))
    [logits] = llm.logits([[*PROMPTS[4], *found.token_ids]])
    assert logits[len(PROMPTS[4]) - 1 : -1].argmax(-1).tolist() == found.token_ids


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_streamed_pieces_join_to_the_text(llm, expected, number):
    pieces = list(llm.stream(PROMPTS[number], PARAMS[number]))
    assert "".join(pieces) == expected[number].text
    assert all(pieces)
    said = llm.tokenizer.decode(expected[number].token_ids)
    assert "".join(pieces).count("\ufffd") <= said.count("\ufffd")


def test_a_stream_that_is_left_early_leaves_no_trace(llm, expected):
    next(llm.stream("the", PARAMS[1]))
    assert llm.generate(PROMPTS[1:2], PARAMS[1]) == expected[1:2]


def test_the_sliding_layers_cache_holds_the_window_and_no_more(llm):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    answers = llm._answers([[9] * 30, [8] * 30], params)
    llm.session.put(answers)
    engine = llm.session.engine
    most = window_pages(llm.spec.sliding_window - 1)
    used = []
    while not all(answer.done for answer in answers):
        llm.session.step()
        used.append(engine.blocks.sliding.used)
        engine.blocks.check(engine.scheduler.running)
    assert max(used[:-1]) == 2 * most < 2 * window_pages(90)
    assert used[-1] == engine.blocks.full.used == 0


def test_the_cache_has_pages_for_as_many_sequences_as_run_at_once(folder):
    with open_llm(folder, "tp1", context=89, batch=2) as llm:
        sliding, full = (cache.k.shape[0] for cache in llm.session.engine.runner.caches)
        assert full == 1 + 2 * 6  # one to spare, and 89 tokens twice
        # The window, one more to grow into, and what a step of all tokens adds.
        assert sliding == 2 * (window_pages(llm.spec.sliding_window) + 1) + 12


def test_dtype_is_the_checkpoints_unless_it_is_named(folder):
    for dtype, expected_dtype in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        with tpx.LLM(folder, "tp1", dtype=dtype, device="cpu") as llm:
            assert llm.dtype == llm.model.get_parameter("model.norm.weight").dtype == expected_dtype
            assert llm.logits([[1]])[0].dtype == torch.float32


def test_a_seed_left_out_is_another_one_each_time_and_for_each_prompt(llm):
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    found = [*llm.generate(["the"] * 2, params), *llm.generate(["the"] * 2, params)]
    assert len({tuple(one.token_ids) for one in found}) == 4


HF = {f"model.layers.*.self_attn.{p}_proj": "colwise" for p in "qkv"}
HF |= {
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.self_attn.sinks": "local_rowwise",
}


def in_hugging_faces_form(folder: Path) -> Any:
    with tpx.LLM(folder, HF, dtype="float32", device="cpu") as llm:
        return llm.generate(PROMPTS[:2], PARAMS[:2]), llm.report


def test_a_plan_in_hugging_faces_form_runs_and_says_what_it_replicates(folder, expected):
    for found, report in ranks(2).run(in_hugging_faces_form, folder):
        assert found == expected[:2]
        assert str(report.mesh) == "tp 2 x edp 2"
        assert "does not name model.embed_tokens, " in report.notes[0]


def fresh_seed(folder: Path, plan: str) -> Any:
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    with open_llm(folder, plan) as llm:
        return llm.generate(["the"] * 3, params)


@pytest.mark.parametrize("plan", ["tp2", "dp2-ep2"])
def test_a_seed_left_out_is_the_same_on_all_ranks(folder, plan):
    first, second = ranks(2).run(fresh_seed, folder, plan)
    assert first == second


def test_ids_need_no_tokenizer(folder, tmp_path, expected):
    changed(folder, tmp_path, "config.json")
    (tmp_path / "tokenizer.json").unlink()
    with open_llm(tmp_path, "tp1") as llm:
        found = llm.generate(PROMPTS[4:], PARAMS[4])[0]
        assert found == expected[4]._replace(text="")
        assert list(llm.stream(PROMPTS[4], PARAMS[4])) == []


def test_tied_embeddings_are_held_once(tmp_path):
    tied = tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    whole = tiny_checkpoint(tmp_path / "whole")
    with open_llm(tied, "tp1") as one, open_llm(whole, "tp1") as other:
        weights = one.model.get_parameter("lm_head.weight")
        assert weights is one.model.get_parameter("model.embed_tokens.weight")
        table = 263 * 64
        assert other.report.bytes_read - one.report.bytes_read == 2 * table
        assert other.report.bytes_held - one.report.bytes_held == 4 * table


def test_what_is_held_in_the_checkpoints_dtype_is_what_was_read(folder):
    with tpx.LLM(folder, "tp1", device="cpu") as llm:
        sizes = sum(shard.nbytes for shard in llm.prepared.index.tensors.values())
        assert llm.report.bytes_read == llm.report.bytes_held == sizes


def test_a_closed_llm_says_so(folder):
    with open_llm(folder, "tp1") as llm:
        pass
    llm.close()
    with pytest.raises(tpx.RequestError, match="the LLM is closed"):
        llm.generate([[1]])


def test_tp_plan_and_model_come_from_the_environment_where_they_are_left_out(folder, monkeypatch):
    monkeypatch.setenv("TPX_MODEL", str(folder))
    monkeypatch.setenv("TPX_TP_PLAN", "tp1")
    with tpx.LLM(device="cpu") as llm:
        assert llm.prepared.plan.path.endswith("tp1.yaml")
    monkeypatch.delenv("TPX_TP_PLAN")
    with tpx.LLM(device="cpu") as llm:
        assert llm.report.mesh.world == 1
