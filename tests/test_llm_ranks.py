"""Ranks that were not called alike: one error, the same on all, that names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ranks import ranks
from tiny import tiny_checkpoint

import tpx
from tpx import SamplingParams
from tpx.agree import difference, parties
from tpx.errors import TpxError

ALIKE = "start all ranks with the same command, and call tpx alike on each of them"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ranks"))


def caught_on(make: Any) -> tuple[str, str, str | None, int]:
    with pytest.raises(TpxError) as caught:
        make()
    error = caught.value
    return type(error).__name__, error.message, error.hint, error.exit_code


def load_by_rank(arguments: list[dict[str, Any]]) -> Any:
    mine = arguments[int(os.environ["RANK"])]
    return caught_on(lambda: tpx.LLM(**{"device": "cpu", **mine}))


def ask_by_rank(folder: Path, requests: list[tuple[Any, Any]]) -> Any:
    with tpx.LLM(folder, "dp2-ep2", device="cpu") as llm:
        prompts, params = requests[int(os.environ["RANK"])]
        said = caught_on(lambda: llm.generate(prompts, params))
        after = llm.generate([[1, 2]], SamplingParams(max_tokens=2))
        return said, len(after)


def test_ranks_given_different_plans(folder):
    plans = [{"path_or_hub_id": folder, "tp_plan": plan} for plan in ("tp2", "ep2")]
    first, second = ranks(2).run(load_by_rank, plans)
    assert first == second
    kind, message, hint, code = first
    assert (kind, hint, code) == ("RequestError", ALIKE, 2)
    assert message.startswith("ranks were given different plans: rank `0` has `")
    assert "tp2.yaml`, rank `1` has `" in message
    assert message.endswith("ep2.yaml`")


def test_ranks_given_different_checkpoints(folder, tmp_path):
    other = tiny_checkpoint(tmp_path, num_hidden_layers=1)
    models = [{"path_or_hub_id": f, "tp_plan": "tp2"} for f in (folder, other, folder, folder)]
    first, second = ranks(2).run(load_by_rank, models)
    message = "ranks were given different checkpoints: "
    message += f"rank `0` has `{folder}`, rank `1` has `{other}`"
    assert first == second == ("RequestError", message, ALIKE, 2)


def test_ranks_given_different_dtypes(folder):
    given = [{"path_or_hub_id": folder, "tp_plan": "tp2", "dtype": d} for d in ("float32", "auto")]
    first, second = ranks(2).run(load_by_rank, given)
    message = "ranks were given different dtypes: rank `0` has `float32`, rank `1` has `bfloat16`"
    assert first == second == ("RequestError", message, ALIKE, 2)


def test_a_mistake_of_one_rank_is_raised_on_all(folder, tmp_path):
    none = tmp_path / "none"
    models = [{"path_or_hub_id": f, "tp_plan": "tp2"} for f in (folder, none)]
    first, second = ranks(2).run(load_by_rank, models)
    message = f"rank `1`: folder `{none}` does not exist"
    hint = "give the folder that holds `config.json`"
    assert first == second == ("CheckpointError", message, hint, 3)


def test_a_mistake_of_all_ranks_reads_as_one(folder):
    first, second = ranks(2).run(load_by_rank, [{"path_or_hub_id": folder, "tp_plan": "tp3"}] * 2)
    assert first == second
    assert not first[1].startswith("rank")


@pytest.mark.parametrize(
    ("requests", "message", "hint"),
    [
        (
            [([[1]], None), ([[2]], None)],
            "ranks were given different prompts: rank `0` against rank `1`",
            ALIKE,
        ),
        (
            [([[1]], SamplingParams(seed=1)), ([[1]], SamplingParams(seed=2))],
            "ranks were given different sampling parameters: rank `0` against rank `1`",
            ALIKE,
        ),
        (
            [([[1]], None), ([[]], None)],
            "rank `1`: prompt `0` is empty",
            "give it at least one token",
        ),
        ([([], None)] * 2, "`prompts` is empty", "give at least one prompt"),
    ],
)
def test_ranks_that_ask_differently_are_told_and_can_go_on(folder, requests, message, hint):
    first, second = ranks(2).run(ask_by_rank, folder, requests)
    assert first == second == (("RequestError", message, hint, 2), 1)


def given(**said: list[str]) -> dict[str, Any]:
    return {"given": said}


def test_the_first_thing_that_differs_is_named_with_all_who_have_it():
    told = [given(plans=["x", "a"], dtypes=[str(rank), "d"]) for rank in range(3)]
    told[1]["given"]["plans"] = ["y", "b"]
    message = "ranks were given different plans: ranks `0`, `2` have `a`, rank `1` has `b`"
    assert difference(told).message == message
    told[1]["given"]["plans"] = ["x", "a"]
    message = "ranks were given different dtypes: rank `0` against rank `1` against rank `2`"
    assert difference(told).message == message


def test_ranks_are_listed_with_what_they_have_where_it_tells_them_apart():
    assert parties([[0, 1], [2]], ["a", "b"]) == "ranks `0`, `1` have `a`, rank `2` has `b`"
    assert parties([[0, 1], [2]], ["a", "a"]) == "ranks `0`, `1` against rank `2`"
