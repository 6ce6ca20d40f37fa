"""Decode steps in fixed shapes, as a GPU captures them, begun before the last tokens are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tiny import PARAMS, PROMPTS, fix_shapes, give_pages, tiny_checkpoint

import tpx
from tpx import SamplingParams
from tpx.engine.request import Request
from tpx.engine.runner import ROWS, shape_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="module")
def plain(folder):
    with tpx.LLM(folder, "tp1", dtype="float32", device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def static(folder):
    with tpx.LLM(folder, "tp1", dtype="float32", device="cpu") as llm:
        fix_shapes(llm)
        yield llm


@pytest.fixture(scope="module")
def expected(plain):
    return plain.generate(PROMPTS, PARAMS)


def test_the_tokens_are_those_of_steps_as_they_come(static, expected):
    assert static.generate(PROMPTS, PARAMS) == expected
    alone = [static.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    assert alone == expected
    assert static.generate(PROMPTS * 4, PARAMS * 4) == expected * 4  # of 20 rows, 24


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), min_size=1, max_size=9))
def test_any_mixture_gives_the_same(plain, static, drawn):
    prompts = [PROMPTS[number] for number, _ in drawn]
    params = [
        SamplingParams(temperature=number % 2, seed=length, max_tokens=length)
        for number, length in drawn
    ]
    assert static.generate(prompts, params) == plain.generate(prompts, params)


def test_a_step_is_begun_before_the_last_ones_tokens_are_read(static, monkeypatch):
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine = static.session.engine
    order = []
    launch, collect = type(engine).launch_static, type(engine).collect
    monkeypatch.setattr(
        type(engine), "launch_static", lambda *a: (order.append("launch"), launch(*a))[1]
    )
    monkeypatch.setattr(
        type(engine), "collect", lambda *a: (order.append("collect"), collect(*a))[1]
    )
    static.generate([[5, 6], [7]], params)
    engine.blocks.check(engine.scheduler.running)
    # The prompts' step; then four tokens more, each begun one ahead.
    assert order == ["collect", "launch", *["launch", "collect"] * 3, "collect"]


def test_what_ends_while_its_next_token_is_drawn_gives_no_more(static, plain):
    [whole] = plain.generate([[3, 1]], SamplingParams(max_tokens=12, ignore_eos=True))
    [answer] = static._answers([[3, 1]], SamplingParams(max_tokens=12, ignore_eos=True))
    answer.request.stop_ids = frozenset({whole.token_ids[5]})
    [found] = static._finish([answer])
    end = whole.token_ids.index(whole.token_ids[5]) + 1
    assert (found.token_ids, found.finish_reason) == (whole.token_ids[:end], "stop")
    blocks = static.session.engine.blocks
    assert blocks.full.used == blocks.sliding.used == 0


def test_a_request_that_comes_later_joins(static, plain):
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    expected = plain.generate([[3, 1], [4, 1, 5]], params)
    first, late = static._answers([[3, 1], [4, 1, 5]], params)
    static.session.put([first])
    for _ in range(4):
        static.session.step()
    static.session.put([late])
    while late.done is None:
        static.session.step()
    assert [first.done, late.done] == expected


def test_what_is_given_up_while_it_is_computed_leaves_the_others_as_they_are(static, plain):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    [expected] = plain.generate([[3, 1]], params)
    other, kept = static._answers([[4, 1, 5], [3, 1]], params)
    static.session.put([other, kept])
    for _ in range(5):
        static.session.step()
    static.session.cancel([other])
    blocks = static.session.engine.blocks
    blocks.check([kept.request])
    while kept.done is None:
        static.session.step()
    assert kept.done == expected
    assert other.done is None
    assert blocks.full.used == blocks.sliding.used == 0


def test_a_preempted_requests_tables_are_written_anew(folder, plain):
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [[3, 1, 4], [9] * 4, [5] * 8]
    expected = plain.generate(prompts, params)
    with tpx.LLM(folder, "tp1", dtype="float32", device="cpu") as llm:
        give_pages(llm, full=6, sliding=40)
        fix_shapes(llm)
        assert llm.generate(prompts, params) == expected
        assert llm.session.engine.scheduler.preempted > 0


def request(temperature: float = 0.0, pages: int = 1, **changes) -> Request:
    return Request((1,), 9, temperature=temperature, full=[0] * pages, **changes)


def test_shapes():
    assert shape_of([request()] * 3) == (4, 64, False, False)
    assert shape_of([request(pages=65)]) == (1, 128, False, False)
    assert shape_of([request(top_k=3), request(1.0, top_p=0.5)]) == (2, 64, False, True)
    assert shape_of([request(1.0, top_k=3)] * ROWS[-1]) == (ROWS[-1], 64, True, False)


def test_more_requests_than_any_shape_has_rows_go_as_they_come(static, plain):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    prompts = [[number % 250] for number in range(ROWS[-1] + 1)]
    assert static.generate(prompts, params) == plain.generate(prompts, params)
