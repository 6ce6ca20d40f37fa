"""What a caller of LLM can get wrong, each with the exact message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import give_pages, tiny_checkpoint

import tpx
from tpx import SamplingParams
from tpx.errors import CheckpointError, PlanError, RequestError, TpxError

IDS_HINT = "a prompt is text or a list of token ids: `[[1, 2, 3]]` is one prompt of three tokens"
EXAMPLE = "write `tpx.SamplingParams(temperature=0.7, max_tokens=64)`"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("errors"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> tpx.LLM:
    return tpx.LLM(folder, "tp1", dtype="float32", device="cpu")


def says(error: TpxError, message: str, hint: str | None) -> None:
    assert error.message == message
    assert error.hint == hint


@pytest.mark.parametrize(
    ("prompts", "message", "hint"),
    [
        ("text", "`prompts` is one text, not a list of prompts", "write `[text]`"),
        (5, "`prompts` is a `int`, not a list of prompts", IDS_HINT),
        ([], "`prompts` is empty", "give at least one prompt"),
        ([1, 2], "prompt `0` is a `int`, not text or token ids", IDS_HINT),
        ([[1], []], "prompt `1` is empty", "give it at least one token"),
        (["a", ""], "prompt `1` is empty", "give it at least one token"),
        (
            [[1, 263]],
            "prompt `0` has token id `263` at place `1`, outside the vocabulary of `263`",
            "ids go from 0 to 262",
        ),
        (
            [[-1]],
            "prompt `0` has token id `-1` at place `0`, outside the vocabulary of `263`",
            "ids go from 0 to 262",
        ),
        ([[1, 2.0]], "prompt `0` has `2.0` at place `1`, which is no token id", IDS_HINT),
        ([[True]], "prompt `0` has `True` at place `0`, which is no token id", IDS_HINT),
        ([b"x"], "prompt `0` is a `bytes`, not text or token ids", IDS_HINT),
        (
            [torch.tensor([1])],
            "prompt `0` is a `Tensor`, not text or token ids",
            "write `tensor.tolist()`",
        ),
        (
            [[1] * 97],
            "prompt `0` has `97` tokens, and the model has `96` positions",
            "shorten it by 1 or more tokens",
        ),
    ],
)
def test_prompts_that_cannot_be_served(llm, prompts, message, hint):
    for call in (llm.generate, llm.logits):
        with pytest.raises(RequestError) as caught:
            call(prompts)
        says(caught.value, message, hint)


def test_a_stream_finds_mistakes_before_its_first_piece(llm):
    with pytest.raises(RequestError) as caught:
        llm.stream([])
    says(caught.value, "prompt `0` is empty", "give it at least one token")


@pytest.mark.parametrize(
    ("params", "message", "hint"),
    [
        ({"temperature": 1}, "`params` is a `dict`, not SamplingParams", EXAMPLE),
        ([SamplingParams(), 3], "`params` is a `int`, not SamplingParams", EXAMPLE),
        (
            [SamplingParams()] * 3,
            "there are `2` prompts and `3` SamplingParams",
            "give one SamplingParams for all prompts, or one for each",
        ),
    ],
)
def test_params_that_do_not_fit(llm, params, message, hint):
    with pytest.raises(RequestError) as caught:
        llm.generate([[1], [2]], params)
    says(caught.value, message, hint)


def test_a_request_that_the_cache_cannot_hold(folder):
    with tpx.LLM(folder, "tp1", dtype="float32", device="cpu") as llm:
        give_pages(llm, full=2, sliding=9)
        with pytest.raises(RequestError) as caught:
            llm.generate([[1], [2] * 9], SamplingParams(max_tokens=30))
        says(
            caught.value,
            "prompt `1` and its new tokens, `39` in all, need `12288` bytes of cache a rank, and "
            "there are `22528`",
            "lower `max_tokens`, shorten the prompt, or cut the heads over more ranks (tp)",
        )


def test_text_without_a_tokenizer(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    hint = "give prompts as lists of token ids, which need no tokenizer"
    with tpx.LLM(tmp_path, "tp1", device="cpu") as llm:
        with pytest.raises(RequestError) as caught:
            llm.generate([[1], "text"])
        says(caught.value, f"prompt `1` is text, and `{tmp_path}` has no `tokenizer.json`", hint)
        with pytest.raises(RequestError) as caught:
            llm.generate([[1]], SamplingParams(stop="x"))
        says(caught.value, f"`stop` is text, and `{tmp_path}` has no `tokenizer.json`", hint)


PLACEMENT = 'a plan says what each rank holds: `tp_plan="auto"`, or a plan\'s name or path'
STORED = "weights stay as the checkpoint stores them (MXFP4 or bfloat16); leave it out"
RANKS = "start one process a GPU: `tpx launch --nproc N SCRIPT`, and name the cut in `tp_plan`"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("device_map", PLACEMENT),
        ("torch_dtype", "write `dtype`"),
        ("load_in_4bit", STORED),
        ("quantization_config", STORED),
        ("tensor_parallel_size", RANKS),
        ("attn_implementation", "there is one attention for each device; leave it out"),
        ("trust_remote_code", "no code of a checkpoint is run; leave it out"),
        ("max_memory", f"{PLACEMENT}; `limits: {{memory: ...}}` in a plan bounds a rank"),
        ("tp_plans", "did you mean `tp_plan`?"),
        (
            "xyzzy",
            "use `tp_plan`, `dtype`, `device`, `revision`, `download`, `use_kernels`, `context`, "
            "`batch`, `memory_fraction`, `prefix_cache` or `graphs`",
        ),
    ],
)
def test_a_keyword_that_llm_does_not_know(word, hint):
    with pytest.raises(RequestError) as caught:
        tpx.LLM("folder", **{word: "auto"})
    says(caught.value, f"`LLM` knows no `{word}`", hint)


PLAN_HINT = "give \"auto\", a path, a shipped plan's name, or a dict in Hugging Face's form"
NO_MODEL = "write `tpx.LLM(PATH_OR_HUB_ID)`"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"path_or_hub_id": None}, "no model is named", f"{NO_MODEL}, or set TPX_MODEL"),
        ({"path_or_hub_id": 5}, "the model is `5`, not a folder or a Hub id", NO_MODEL),
        ({"path_or_hub_id": ""}, "the model is `''`, not a folder or a Hub id", NO_MODEL),
        ({"tp_plan": 2}, "`tp_plan` is `2`", PLAN_HINT),
        ({"tp_plan": ["tp1"]}, "`tp_plan` is `['tp1']`", PLAN_HINT),
        ({"dtype": "bf16"}, "`dtype` is `bf16`", "did you mean `bfloat16`?"),
        (
            {"dtype": torch.int8},
            "`dtype` is `torch.int8`",
            "use `auto`, `bfloat16`, `float16` or `float32`",
        ),
        ({"device": 0}, "`device` is `0`, not text", 'write `device="..."`'),
        ({"revision": 1}, "`revision` is `1`, not text", 'write `revision="..."`'),
    ],
)
def test_arguments_that_make_no_sense(folder, monkeypatch, arguments, message, hint):
    monkeypatch.delenv("TPX_MODEL", raising=False)
    with pytest.raises(RequestError) as caught:
        tpx.LLM(**{"path_or_hub_id": folder, "tp_plan": "tp1", "device": "cpu", **arguments})
    says(caught.value, message, hint)


def test_a_plan_for_two_ranks_in_a_process_alone(folder):
    with pytest.raises(PlanError) as caught:
        tpx.LLM(folder, "tp2", device="cpu")
    assert caught.value.message.endswith("tp2.yaml` is for 2 ranks (tp 2 x edp 2), and there is 1")
    assert "`tpx launch --nproc 2" in caught.value.hint


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        tpx.LLM(tmp_path / "none", device="cpu")
    assert caught.value.message == f"folder `{tmp_path / 'none'}` does not exist"
