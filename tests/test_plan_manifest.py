"""tpx.json: whatever it says, the outcome is a plan or one error that says what is wrong."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from sharded import AGAIN, check_one_span, two_ranks

from tpx.errors import CheckpointError, PlanError
from tpx.plan.manifest import file_name, read_manifest
from tpx.plan.prepare import prepare
from tpx.version import __version__


@pytest.fixture
def two(tmp_path) -> Path:
    return two_ranks(tmp_path)


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        prepare(folder, "auto", 2).rank_plan(0)
    return caught.value


def rewrite(folder: Path, **changes: Any) -> None:
    """Other values in tpx.json; None removes the key."""
    said = json.loads((folder / "tpx.json").read_text()) | changes
    said = {key: value for key, value in said.items() if value is not None}
    (folder / "tpx.json").write_text(json.dumps(said))


FILES = {
    file_name(rank, 2): {"nbytes": 1, "sha256": "0" * 64, "header": "0" * 64} for rank in (0, 1)
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "it has no `format`"),
        ({"world": 0}, "`world` is `0`"),
        ({"world": True}, "`world` is `True`"),
        ({"world": 10**6}, "`world` is `1000000`"),
        ({"world": 3}, f"`files` are not `{file_name(0, 3)}` to `{file_name(2, 3)}`"),
        ({"mesh": {"tp": 2}}, "its plan is for tp 2 x ep 2, its mesh or world another"),
        ({"plan": 7}, "`plan` is no text"),
        ({"tensors": []}, "`tensors` is no object"),
        ({"tensors": {"x": ["U9", [1]]}}, "tensor `x` has no dtype and shape"),
        ({"tensors": {"x": ["U8", [-1]]}}, "tensor `x` has no dtype and shape"),
        ({"tensors": {"x": ["U8", [True]]}}, "tensor `x` has no dtype and shape"),
        ({"tensors": {"x": "U8"}}, "tensor `x` has no dtype and shape"),
        ({"files": 1}, f"`files` are not `{file_name(0, 2)}` to `{file_name(1, 2)}`"),
        ({"files": FILES | {"../x": 1}},
         f"`files` are not `{file_name(0, 2)}` to `{file_name(1, 2)}`"),
        ({"files": FILES | {file_name(0, 2): 1}},
         f"`{file_name(0, 2)}` needs nbytes, sha256, header, and no more"),
        ({"files": FILES | {file_name(0, 2): FILES[file_name(0, 2)] | {"sha256": "g" * 64}}},
         f"`{file_name(0, 2)}` has no size and hashes"),
        ({"files": FILES | {file_name(0, 2): FILES[file_name(0, 2)] | {"nbytes": "1"}}},
         f"`{file_name(0, 2)}` has no size and hashes"),
        ({"config": None},
         "its keys are `['files', 'format', 'mesh', 'plan', 'source', 'tensors', 'tpx', 'world']`"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_refused(two, changes, message):
    rewrite(two, **changes)
    error = refused(two)
    assert error.message == f"`tpx.json` is damaged: {message}"
    assert error.hint == AGAIN


def test_a_manifest_of_another_format_is_refused(two):
    rewrite(two, format=2)
    error = refused(two)
    assert error.message == "`tpx.json` has format `2`, and this tpx reads 1"
    assert error.hint == f"use the tpx that wrote it, or {AGAIN}"


def test_a_manifest_that_is_no_json_or_no_file_is_refused(two):
    (two / "tpx.json").write_text("{")
    assert refused(two).message.startswith("`tpx.json` is damaged: the JSON does not")
    (two / "tpx.json").unlink()
    os.mkfifo(two / "tpx.json")
    assert refused(two).message == "`tpx.json` is a pipe, not a file"


def test_files_of_another_plan_than_the_manifests_are_refused(two):
    """As nobody but a forger makes them: sizes and hashes fit, shapes do not."""
    other = prepare(two.parent / "whole", "tp2-etp2", 2)
    rewrite(two, plan=other.plan_text(), mesh={"dp": 1, "tp": 2, "edp": 1, "ep": 1, "etp": 2})
    error = refused(two)
    assert error.message == (
        "the plan gives `model.layers.0.mlp.experts.gate_up_proj_blocks` as U8 [8, 128, 2, 16], "
        f"and `{file_name(0, 2)}` holds U8 [4, 192, 2, 16]"
    )
    assert error.hint == AGAIN


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value inside a JSON value."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else ())
    )
    return [at, *(path for key, one in inside for path in paths(one, (*at, key)))]


@pytest.fixture(scope="module")
def mutable(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("fuzz")
    out = two_ranks(folder)
    return out, (out / "tpx.json").read_text()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), value=VALUES)
def test_whatever_a_manifest_says_the_outcome_is_a_plan_or_an_error(mutable, data, value):
    folder, text = mutable
    said = json.loads(text)
    path = data.draw(st.sampled_from(paths(said)))
    if path:
        owner = said
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = value
    else:
        said = value
    (folder / "tpx.json").write_text(json.dumps(said))
    with suppress(CheckpointError, PlanError):
        check_one_span(prepare(folder, "auto", 2))


def test_a_manifest_comes_back_as_it_was_written(two):
    manifest, digest = read_manifest(two)
    assert (manifest.world, manifest.tpx, len(digest)) == (2, __version__, 64)
    (two / "tpx.json").write_text(manifest.to_json())
    assert read_manifest(two) == (manifest, digest)
