"""async_engine.py: requests from coroutines, on one rank and on several."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from ranks import ranks
from tiny import PARAMS, PROMPTS, open_llm, tiny_checkpoint

import tpx
from tpx import SamplingParams, async_engine

LONG = SamplingParams(max_tokens=80, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("async"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> tpx.LLM:
    return open_llm(folder, "tp1")


@pytest.fixture(scope="module")
def expected(llm: tpx.LLM) -> list[tpx.Completion]:
    return llm.generate(PROMPTS, PARAMS)


async def whole(engine: tpx.AsyncEngine, prompt: Any, params: SamplingParams) -> list[Any]:
    """The completions of a request, whose pieces must join to them."""
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    done = {}
    async for piece in engine.generate(tpx.Request(prompt, params)):
        texts[piece.choice] = texts.get(piece.choice, "") + piece.text
        ids.setdefault(piece.choice, []).extend(piece.token_ids)
        if piece.completion is not None:
            done[piece.choice] = piece.completion
    assert [done[i].text for i in sorted(done)] == [texts[i] for i in sorted(done)]
    assert [done[i].token_ids for i in sorted(done)] == [ids[i] for i in sorted(done)]
    return [done[i] for i in sorted(done)]


async def all_at_once(llm: tpx.LLM) -> list[Any]:
    async with tpx.AsyncEngine(llm) as engine:
        if not engine.leads:
            await asyncio.to_thread(engine.follow)
            return []
        asked = zip(PROMPTS, PARAMS, strict=True)
        return await asyncio.gather(*(whole(engine, prompt, params) for prompt, params in asked))


def on_rank(folder: Path, plan: str) -> Any:
    with open_llm(folder, plan) as llm:
        found = asyncio.run(all_at_once(llm))
        return found, llm.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize(("plan", "world"), [("tp1", 1), ("tp2", 2), ("dp2-ep2", 2)])
def test_coroutines_get_what_generate_gives_and_the_llm_is_free_again(
    folder, expected, plan, world
):
    told = ranks(world).run(on_rank, folder, plan)
    assert told[0][0] == [[one] for one in expected]
    assert [found for found, _ in told[1:]] == [[]] * (world - 1)
    assert all(after == expected for _, after in told)


def test_n_continuations_come_side_by_side(llm):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=9, n=3)

    async def ask() -> list[Any]:
        async with tpx.AsyncEngine(llm) as engine:
            return await whole(engine, "the", params)

    assert asyncio.run(ask()) == llm.generate(["the"], params)


def test_a_request_that_is_left_early_is_given_up_at_once(llm):
    async def leave() -> tuple[int, int]:
        async with tpx.AsyncEngine(llm) as engine:
            pieces = engine.generate(tpx.Request([1, 2], LONG))
            await anext(pieces)
            await pieces.aclose()
            [other] = await whole(engine, [7], PARAMS[0])
            scheduler = engine.session.engine.scheduler
            return scheduler.unfinished, len(other.token_ids)

    assert asyncio.run(leave()) == (0, 12)
    assert llm.session.engine.blocks.full.used == 0


def test_requests_join_while_others_run(llm, expected):
    async def join() -> list[Any]:
        async with tpx.AsyncEngine(llm) as engine:
            first = engine.generate(tpx.Request([1, 2], LONG))
            heard = [await anext(first)]
            found = await whole(engine, PROMPTS[1], PARAMS[1])
            assert heard[-1].completion is None
            async for piece in first:
                heard.append(piece)
            return [found[0], heard[-1].completion]

    joined, long = asyncio.run(join())
    assert joined == expected[1]
    assert long == llm.generate([[1, 2]], LONG)[0]


def message(error: pytest.ExceptionInfo[tpx.TpxError]) -> tuple[str, str | None]:
    return error.value.message, error.value.hint


def test_the_llm_is_the_engines_own_until_it_closes(llm):
    async def use() -> None:
        async with tpx.AsyncEngine(llm):
            for call in (lambda: llm.generate([[1]]), lambda: tpx.AsyncEngine(llm)):
                with pytest.raises(tpx.RequestError) as caught:
                    call()
                assert message(caught) == (
                    "an AsyncEngine has the LLM",
                    "ask it, or close it first: `await engine.close()`",
                )

    asyncio.run(use())
    assert llm.generate([[1]], SamplingParams(max_tokens=1))


def test_a_wrong_request_is_refused_and_the_others_go_on(llm, expected):
    async def ask() -> list[Any]:
        async with tpx.AsyncEngine(llm) as engine:
            good = asyncio.create_task(whole(engine, PROMPTS[4], PARAMS[4]))
            with pytest.raises(tpx.RequestError) as caught:
                await whole(engine, [], PARAMS[0])
            assert message(caught)[1] == "give it at least one token"
            return await good

    assert asyncio.run(ask()) == [expected[4]]


def test_whoever_waits_when_it_closes_is_told_and_who_comes_later_too(llm):
    async def ask() -> None:
        engine = tpx.AsyncEngine(llm)
        waiting = asyncio.create_task(whole(engine, [1, 2], LONG))
        await anext(engine.generate(tpx.Request([3], LONG)))
        await engine.close()
        for call in (waiting, whole(engine, [1], LONG)):
            with pytest.raises(tpx.RequestError) as caught:
                await call
            assert message(caught) == (
                "the AsyncEngine is closed",
                "make a new one: `tpx.AsyncEngine(llm)`",
            )

    asyncio.run(ask())


def test_an_error_of_the_engine_reaches_whoever_waits(folder):
    async def ask(llm: tpx.LLM) -> None:
        async with tpx.AsyncEngine(llm) as engine:
            engine.session.engine.runner.model = None
            for _ in range(2):
                with pytest.raises(TypeError):
                    await whole(engine, [1, 2], LONG)

    with open_llm(folder, "tp1") as llm:
        asyncio.run(ask(llm))


def idle(folder: Path) -> Any:
    async_engine.IDLE_SECONDS = 0.02
    told = []
    hear = async_engine.AsyncEngine._hear

    def heard(self: tpx.AsyncEngine) -> Any:
        told.append(hear(self))
        return told[-1]

    async_engine.AsyncEngine._hear = heard

    async def wait(llm: tpx.LLM) -> Any:
        async with tpx.AsyncEngine(llm) as engine:
            if not engine.leads:
                return await asyncio.to_thread(engine.follow)
            while len(told) < 3:
                await asyncio.sleep(0.005)
            return await whole(engine, [7], PARAMS[0])

    with open_llm(folder, "tp2") as llm:
        return asyncio.run(wait(llm))


def test_ranks_with_nothing_to_do_hear_of_it_before_they_give_up(folder, expected):
    assert ranks(2).run(idle, folder) == [[expected[0]], None]


def followers(folder: Path) -> Any:
    async def ask(llm: tpx.LLM) -> Any:
        async with tpx.AsyncEngine(llm) as engine:
            if os.environ["RANK"] == "0":
                with pytest.raises(tpx.RequestError) as caught:
                    engine.follow()
                return message(caught)
            with pytest.raises(tpx.RequestError) as caught:
                await whole(engine, [1], LONG)
            await asyncio.to_thread(engine.follow)
            return message(caught)

    with open_llm(folder, "tp2") as llm:
        return asyncio.run(ask(llm))


def test_who_asks_and_who_follows(folder):
    first, second = ranks(2).run(followers, folder)
    assert first == (
        "the first rank follows nobody",
        "call `engine.follow()` where not `engine.leads`",
    )
    assert second == ("only the first rank asks", "call `engine.follow()` on the others")
