"""session.py and the engine under it: whoever comes when, and is given up, all get their tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from ranks import ranks
from tiny import PARAMS, PROMPTS, fix_shapes, give_pages, open_llm, tiny_checkpoint

import tpx
from tpx import SamplingParams

# Each dispatch, at each world: tokens of one tp group, of several, by all-gather, by all-to-all.
PLANS = [("tp2-ep2", 2), ("dp2-ep2", 2)]
MORE = [("tp2", 2), ("ep2", 2), ("dp2-ep2-gather", 2), ("dp2-tp2-ep4", 4), ("tp4-ep2-etp2", 4)]
ASKED = [(PROMPTS[i % 5], PARAMS[i % 5]) for i in range(10)]
GREEDY = SamplingParams(max_tokens=11, ignore_eos=True)
ASKED += [([5, 6, 7] * 12, GREEDY), ([5, 6, 7] * 12 + [9], GREEDY), ([5, 6, 7] * 20, GREEDY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("session"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> tpx.LLM:
    return open_llm(folder, "tp1")


@pytest.fixture(scope="module")
def expected(llm: tpx.LLM) -> list[tpx.Completion]:
    """One at a time, from an empty cache."""
    with open_llm(Path(llm.prepared.folder), "tp1", prefix_cache=False) as alone:
        return [alone.generate([prompt], params)[0] for prompt, params in ASKED]


Found = list[tuple[int, tpx.Completion]]  # numbers of ASKED, and what they gave


def traffic(llm: tpx.LLM, seed: int) -> tuple[Found, bool, bool]:
    """Requests that come at random moments, some given up, with a cache and steps of random
    sizes. -> what they gave, whether one was preempted, whether one found a part computed."""
    draw = random.Random(seed)
    blocks = draw.choice([5, 6, 8, 40])
    give_pages(llm, blocks, draw.choice([9, 20, 40]), draw.choice([1, 5, 16, 33, 512]))
    if draw.random() < 0.5:
        fix_shapes(llm)
    coming = [draw.randrange(len(ASKED)) for _ in range(draw.randint(1, 12))]
    under_way: dict[int, Any] = {}
    found, shared = [], False
    while coming or under_way:
        while coming and draw.random() < 0.7:
            number = coming.pop()
            prompt, params = ASKED[number]
            [answer] = llm._answers([prompt], params)
            llm.session.put([answer])
            under_way[answer.request.id] = (number, answer)
        if under_way and draw.random() < 0.05:
            given_up = draw.choice(sorted(under_way))
            llm.session.cancel([under_way.pop(given_up)[1]])
        for answer in llm.session.step():
            number, _ = under_way.pop(answer.request.id)
            found.append((number, answer.done))
            shared |= answer.request.found > 0
    engine = llm.session.engine
    while engine.step() is not None:
        pass
    assert engine.blocks.full.used == engine.blocks.sliding.used == 0
    engine.blocks.check([])
    return found, engine.scheduler.preempted > 0, shared


def some_traffic(folder: Path, plan: str, seeds: range) -> list[tuple[Found, bool, bool]]:
    with open_llm(folder, plan) as llm:
        return [traffic(llm, seed) for seed in seeds]


def check(told: list[tuple[Found, bool, bool]], expected: list[tpx.Completion]) -> None:
    assert any(found for found, *_ in told)
    for found, *_ in told:
        for number, completion in found:
            assert completion == expected[number], number


def test_any_traffic_gives_what_each_request_gives_alone(folder, expected):
    told = some_traffic(folder, "tp1", range(16))
    check(told, expected)
    assert any(preempted for _, preempted, _ in told)
    assert any(shared for *_, shared in told)


def on_ranks(folder: Path, plan: str, world: int, seeds: range) -> list[tuple[Found, bool, bool]]:
    """All ranks get the same completions, in the same order; what a dp group's own engine did
    differs."""
    told = ranks(world).run(some_traffic, folder, plan, seeds)
    for one in told:
        assert [found for found, *_ in one] == [found for found, *_ in told[0]]
    return told[0]


@pytest.mark.parametrize(
    ("plan", "world"), [*PLANS, *(pytest.param(*one, marks=pytest.mark.more) for one in MORE)]
)
def test_any_traffic_on_ranks(folder, expected, plan, world):
    check(on_ranks(folder, plan, world, range(20, 22)), expected)


@pytest.mark.soak
@pytest.mark.parametrize(("plan", "world"), [("tp1", 1), *PLANS, *MORE])
def test_much_traffic(folder, expected, plan, world):
    for begin in range(1000, 1060, 20):
        check(on_ranks(folder, plan, world, range(begin, begin + 20)), expected)


def test_prompts_that_begin_alike_are_computed_once(folder, expected):
    with open_llm(folder, "tp1") as llm:
        answers = llm._answers([prompt for prompt, _ in ASKED[-3:]], GREEDY)
        for answer in answers:
            llm._finish([answer])
        assert [answer.request.found for answer in answers] == [0, 32, 32]
        assert [answer.done for answer in answers] == expected[-3:]


def test_a_prefix_is_found_again_only_where_nothing_before_it_differs(folder):
    with open_llm(folder, "tp1") as llm, open_llm(folder, "tp1", prefix_cache=False) as plain:
        body = [5, 6, 7] * 16
        prompts = [body, [8, *body[1:]], [*body[:20], 8, *body[21:]], body]
        for prompt in prompts:
            assert llm.generate([prompt], GREEDY) == plain.generate([prompt], GREEDY)


def test_logprobs_are_those_of_the_logits(llm):
    params = SamplingParams(max_tokens=6, logprobs=3, temperature=1.0, seed=7)
    [found] = llm.generate([PROMPTS[4]], params)
    [logits] = llm.logits([[*PROMPTS[4], *found.token_ids]])
    expected = logits[len(PROMPTS[4]) - 1 : -1].log_softmax(-1)
    assert len(found.logprobs) == len(found.token_ids) == 6
    for row, token, likely in zip(expected, found.token_ids, found.logprobs, strict=True):
        assert likely.logprob == pytest.approx(row[token].item(), abs=1e-4)
        top = row.topk(3)
        assert [token for token, _ in likely.top] == top.indices.tolist()
        assert [value for _, value in likely.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert (
        found.token_ids == llm.generate([PROMPTS[4]], changed(params, logprobs=None))[0].token_ids
    )
    [none] = llm.generate([PROMPTS[4]], changed(params, logprobs=0))
    assert none.logprobs == [likely._replace(top=()) for likely in found.logprobs]


def changed(params: SamplingParams, **values: Any) -> SamplingParams:
    fields = SamplingParams.__dataclass_fields__
    return SamplingParams(**{name: getattr(params, name) for name in fields} | values)


def test_n_continuations_are_those_of_the_seeds_that_follow(llm):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=8)
    found = llm.generate(["the", [7]], changed(params, n=3))
    alone = [
        llm.generate([prompt], changed(params, seed=5 + i))[0]
        for prompt in ("the", [7])
        for i in range(3)
    ]
    assert found == alone
    fresh = llm.generate(["the"], SamplingParams(temperature=1.0, n=4, max_tokens=12))
    assert len({tuple(one.token_ids) for one in fresh}) == 4


def batched(folder: Path, plan: str, count: int) -> Any:
    taken = []

    def requests():
        for number in range(count):
            taken.append(number)
            prompt, params = ASKED[number % len(ASKED)]
            yield tpx.Request(prompt, changed(params, n=1 + number % 2), id=f"r{number}")

    with open_llm(folder, plan, batch=4) as llm:
        results, most = [], 0
        for result in llm.generate_batch(requests()):
            results.append(result)
            most = max(most, len(taken) - len(results))
        return results, most, len(taken)


@pytest.mark.parametrize(("plan", "world"), [("tp1", 1), ("tp2", 2), ("dp2-ep2", 2)])
def test_an_iterable_is_taken_from_as_room_comes_by_the_first_rank_alone(
    folder, expected, plan, world
):
    told = ranks(world).run(batched, folder, plan, 40)
    for results, _, _ in told:
        assert results == told[0][0]
    results, most, taken = told[0]
    assert taken == 40
    assert most < 30
    assert [count for _, _, count in told[1:]] == [0] * (world - 1)
    assert {result.id for result in results} == {f"r{number}" for number in range(40)}
    for name, completions in results:
        number = int(name[1:])
        assert completions[0] == expected[number % len(ASKED)]
        assert len(completions) == 1 + number % 2


def wrong_batch(folder: Path, plan: str) -> Any:
    with open_llm(folder, plan) as llm:
        with pytest.raises(tpx.RequestError) as caught:
            list(llm.generate_batch([tpx.Request([1, 2]), tpx.Request([300])]))
        engine = llm.session.engine
        assert engine.scheduler.unfinished == 0
        return caught.value.message, llm.generate([[1]], GREEDY)


@pytest.mark.parametrize(("plan", "world"), [("tp1", 1), ("dp2-ep2", 2)])
def test_a_request_that_is_wrong_is_said_on_all_ranks_and_leaves_nothing(folder, llm, plan, world):
    message = "request `1` has token id `300` at place `0`, outside the vocabulary of `263`"
    for told, after in ranks(world).run(wrong_batch, folder, plan):
        assert told == message
        assert after == llm.generate([[1]], GREEDY)


def test_a_batch_that_is_left_early_leaves_nothing(llm):
    batch = llm.generate_batch(tpx.Request([7], GREEDY) for _ in range(500))
    next(batch)
    batch.close()
    engine = llm.session.engine
    assert engine.scheduler.unfinished == engine.blocks.full.used == len(llm.session.open) == 0


@pytest.mark.parametrize(
    ("request_", "message", "hint"),
    [
        ("text", "request `0` is a `str`, not a Request",
         "write `tpx.Request(prompt, tpx.SamplingParams(max_tokens=64))`"),
        (tpx.Request([1], id=1.5), "`id` is `1.5`, neither text nor a whole number", None),
        (tpx.Request([], id="x"), "request `x` is empty", "give it at least one token"),
        (tpx.Request([1] * 97, id=4),
         "request `4` has `97` tokens, and the model has `96` positions",
         "shorten it by 1 or more tokens"),
    ],
)  # fmt: skip
def test_what_is_no_request(llm, request_, message, hint):
    with pytest.raises(tpx.RequestError) as caught:
        list(llm.generate_batch([request_]))
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_context_below_the_models_bounds_prompts_and_continuations(folder):
    with open_llm(folder, "tp1", context=12) as llm:
        [found] = llm.generate([[5] * 8], SamplingParams(max_tokens=50, ignore_eos=True))
        assert (len(found.token_ids), found.finish_reason) == (4, "length")
        with pytest.raises(tpx.RequestError, match="prompt `0` has `13` tokens, and `context` is"):
            llm.generate([[5] * 13])


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"context": 97}, "`context` is `97`, and the model has `96` positions",
         "write at most `context=96`"),
        ({"context": 0}, "`context` is `0`, and must be a whole number from 1 up",
         "leave it out, or write `context=16`"),
        ({"batch": "8"}, "`batch` is `'8'`, and must be a whole number from 1 up",
         "leave it out, or write `batch=16`"),
        ({"memory_fraction": 1.5},
         "`memory_fraction` is `1.5`, and must be a number above 0 and at most 1",
         "leave it out, or write `memory_fraction=0.9`"),
        ({"prefix_cache": 1}, "`prefix_cache` is `1`, and must be True or False", None),
        ({"graphs": "on"}, "`graphs` is `'on'`, and must be True or False", None),
    ],
)  # fmt: skip
def test_sizes_of_the_engine_that_make_no_sense(folder, options, message, hint):
    with pytest.raises(tpx.RequestError) as caught:
        open_llm(folder, "tp1", **options)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_no_memory_for_a_cache(folder):
    with pytest.raises(tpx.LaunchError) as caught:
        open_llm(folder, "tp1", memory_fraction=1e-12)
    assert caught.value.message == (
        "a cache of one page needs `75,776` bytes a rank, and there is room for `0`"
    )
    assert caught.value.hint == "raise `memory_fraction`, or cut the model over more ranks"
