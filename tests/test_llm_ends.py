"""How a continuation ends: stop tokens, stop strings, the model's last position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import PARAMS, PROMPTS, changed, open_llm, tiny_checkpoint

import tpx
from tpx import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> tpx.LLM:
    return open_llm(folder, "tp1")


@pytest.fixture(scope="module")
def expected(llm: tpx.LLM) -> list[tpx.Completion]:
    return llm.generate(PROMPTS, PARAMS)


def test_text_ends_before_a_stop_string_and_says_stop(llm, expected):
    text = expected[4].text
    stop = text[10:13]
    cut = text[: text.index(stop)]
    params = SamplingParams(**{**values(PARAMS[4]), "stop": stop})
    [found] = llm.generate(PROMPTS[4:], params)
    assert (found.text, found.finish_reason) == (cut, "stop")
    assert found.token_ids == expected[4].token_ids[: len(found.token_ids)]
    assert len(found.token_ids) < len(expected[4].token_ids)
    assert "".join(llm.stream(PROMPTS[4], params)) == cut


def values(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


def test_a_stop_string_in_the_last_token_allowed_is_a_stop(llm, expected):
    last = llm.tokenizer.decode(expected[3].token_ids[:5])
    length = len(llm.generate(PROMPTS[3:4], SamplingParams(max_tokens=5, **some(3)))[0].text)
    assert length == len(last)
    params = SamplingParams(max_tokens=5, stop=last[-1], **some(3))
    [found] = llm.generate(PROMPTS[3:4], params)
    assert found.finish_reason == "stop"
    assert found.text == last[: last.index(last[-1])]


def some(number: int) -> dict[str, Any]:
    wanted = ("temperature", "top_k", "top_p", "seed", "ignore_eos")
    return {name: getattr(PARAMS[number], name) for name in wanted}


def stops(found: tpx.Completion, token: int, all_tokens: list[int]) -> None:
    assert found.finish_reason == "stop"
    assert found.token_ids == all_tokens[: all_tokens.index(token) + 1]


def test_stop_tokens_are_the_generation_configs_else_the_configs(folder, llm, tmp_path):
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    [free] = llm.generate(["the"], SamplingParams(**{**values(params), "ignore_eos": True}))
    first, second = free.token_ids[6], free.token_ids[9]
    both = changed(folder, tmp_path, "config.json", eos_token_id=first)
    changed(both, both, "generation_config.json", eos_token_id=[261, second])
    with open_llm(both, "tp1") as other:
        stops(other.generate(["the"], params)[0], second, free.token_ids)
        assert other.generate(
            ["the"], SamplingParams(**{**values(params), "ignore_eos": True})
        ) == [free]
    changed(both, both, "generation_config.json", eos_token_id=None)
    with open_llm(both, "tp1") as other:
        stops(other.generate(["the"], params)[0], first, free.token_ids)
    (both / "generation_config.json").unlink()
    with open_llm(both, "tp1") as other:
        [found] = other.generate(["the"], params)
        stops(found, first, free.token_ids)
        said = other.tokenizer.decode(free.token_ids[: free.token_ids.index(first)])
        assert found.text in (said, said.removesuffix("\ufffd"))


def test_a_sequence_ends_at_the_models_last_position(llm):
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    found = llm.generate([[5] * 90, [5] * 95, [5] * 96], params)
    assert [len(one.token_ids) for one in found] == [6, 1, 0]
    assert [one.finish_reason for one in found] == ["length"] * 3
    assert llm.logits([[5] * 96])[0].shape == (96, 263)
    assert list(llm.stream([5] * 96, params)) == []
