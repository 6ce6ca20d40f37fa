"""Decoding by CUDA graphs: the tokens that the model's own logits say."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from tiny import tiny_config

import tpx
from tpx import SamplingParams

pytestmark = pytest.mark.gpu
SHARE = 0.4  # of the memory, for each of two models
ROUNDING = 0.5  # of logits in bfloat16, of which the largest are around 4 (0.28 was seen)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory):
    config = tiny_config(
        hidden_size=2880,
        intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
        max_position_embeddings=4096,
    )
    folder = make_checkpoint(Path(tmp_path_factory.mktemp("gpu")) / "engine", config, seed=1)
    # What is found in the cache was computed in other shapes, and rounds otherwise.
    with tpx.LLM(folder, "tp1", device="cuda", prefix_cache=False, memory_fraction=SHARE) as llm:
        assert llm.session.engine.runner.static
        yield llm


PROMPTS = [[7], list(range(200)), [3, 1, 4], list(range(20, 70)), [9] * 15]


def test_greedy_tokens_are_the_likeliest_of_the_logits(llm):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    follow_from_their_logits(llm, llm.generate(PROMPTS, params))


def follow_from_their_logits(llm: tpx.LLM, found: list[tpx.Completion]) -> None:
    whole = [[*prompt, *one.token_ids] for prompt, one in zip(PROMPTS, found, strict=True)]
    for prompt, one, logits in zip(PROMPTS, found, llm.logits(whole), strict=True):
        rows = logits[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        assert (rows.max(1).values - chosen).max() < ROUNDING


def test_the_same_tokens_come_every_time_whatever_came_between(llm):
    drawn = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=5, max_tokens=40, ignore_eos=True)
        for t, k, p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 20, 1.0), (1.2, 0, 0.9), (1.0, 9, 0.8))
    ]
    once = llm.generate(PROMPTS, drawn)
    llm.generate(PROMPTS[::-1] * 3, SamplingParams(max_tokens=9))
    assert llm.generate(PROMPTS, drawn) == once
    assert len({tuple(one.token_ids) for one in once}) == len(once)


def test_a_request_that_ends_early_and_one_that_comes_late(llm):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 50, 1, 20, 33)]
    found = llm.generate(PROMPTS, params)
    assert [len(one.token_ids) for one in found] == [3, 50, 1, 20, 33]


@pytest.fixture(scope="module")
def sharing(llm):
    with tpx.LLM(llm.prepared.folder, "tp1", device="cuda", memory_fraction=2 * SHARE) as other:
        yield other


def test_what_is_found_in_the_cache_and_what_gives_way_changes_nothing_but_rounding(sharing):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    sharing.generate(PROMPTS, params)
    answers = sharing._answers(PROMPTS, params)
    found = sharing._finish(answers)
    assert [answer.request.found for answer in answers] == [0, 192, 0, 48, 0]
    follow_from_their_logits(sharing, found)


def test_steps_that_are_not_captured_give_the_same_but_for_rounding(llm):
    params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=2)
    found = llm.generate(PROMPTS, params)
    follow_from_their_logits(llm, found)
    for one in found:
        assert [likely.top[0][0] for likely in one.logprobs] == one.token_ids


def test_many_requests_of_all_lengths(llm):
    prompts = [[i % 250, *range(i % 97)] for i in range(300)]
    params = [SamplingParams(max_tokens=1 + i % 40, ignore_eos=True) for i in range(300)]
    found = llm.generate(prompts, params)
    assert [len(one.token_ids) for one in found] == [1 + i % 40 for i in range(300)]
    blocks = llm.session.engine.blocks
    assert blocks.full.used == blocks.sliding.used == 0


def test_coroutines_are_served_from_another_thread(llm):
    async def ask() -> list[tpx.Completion | None]:
        async with tpx.AsyncEngine(llm) as engine:

            async def one(prompt: list[int]) -> tpx.Completion | None:
                done = None
                async for piece in engine.generate(tpx.Request(prompt, params)):
                    done = piece.completion
                return done

            return await asyncio.gather(*map(one, PROMPTS))

    params = SamplingParams(max_tokens=40, ignore_eos=True)
    follow_from_their_logits(llm, asyncio.run(ask()))


def test_the_whole_process_stays_within_its_share_of_the_memory(llm):
    total = torch.cuda.get_device_properties(0).total_memory
    free, _ = torch.cuda.mem_get_info()
    assert total - free < total * (2 * SHARE + 0.05)
