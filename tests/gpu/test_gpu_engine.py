"""Decoding by CUDA graphs: the tokens that the model's own logits say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_checkpoint import make_checkpoint
from tiny import tiny_config

import tpx
from tpx import SamplingParams

pytestmark = pytest.mark.gpu
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
    with tpx.LLM(folder, "tp1", device="cuda") as llm:
        assert llm._static
        yield llm


PROMPTS = [[7], list(range(200)), [3, 1, 4], list(range(20, 70)), [9] * 15]


def test_greedy_tokens_are_the_likeliest_of_the_logits(llm):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    found = llm.generate(PROMPTS, params)
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
