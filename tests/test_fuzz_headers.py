"""Damaged headers without end: each a table of tensors or one CheckpointError, within a second."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import fuzz_headers
import pytest
from fuzz_headers import damaged, file_of, judge, judge_folder, sound, write_damaged, written
from hypothesis import given, settings, strategies as st
from launching import environment
from safetensors import SafetensorError

from tpx import index

DRAWS = st.randoms(use_true_random=False)


def judge_seeds(count: int) -> int:
    """-> how many of them were read."""
    return sum(judge(*damaged(random.Random(seed))) is not None for seed in range(count))


@settings(max_examples=40)
@given(DRAWS)
def test_a_sound_header_is_read(draw):
    assert judge(*file_of(written(sound(draw)).encode())) is not None


@settings(max_examples=60)
@given(DRAWS)
def test_any_header_ends_well(draw):
    judge(*damaged(draw))


@settings(max_examples=60)
@given(st.binary(max_size=64), st.integers(0, 100))
def test_any_bytes_end_well(data, size):
    judge(data, size)


@pytest.mark.parametrize(
    "count",
    [
        300,
        pytest.param(60_000, marks=pytest.mark.more),
        pytest.param(2_000_000, marks=pytest.mark.soak),
    ],
)
def test_headers_of_many_seeds_end_well(count):
    read = judge_seeds(count)
    assert count // 20 < read < count // 2  # neither all sound, nor none


@pytest.mark.parametrize(
    "count",
    [
        50,
        pytest.param(2_000, marks=pytest.mark.more),
        pytest.param(50_000, marks=pytest.mark.soak),
    ],
)
def test_folders_of_many_seeds_end_well(tmp_path, count):
    read = 0
    for seed in range(count):
        write_damaged(random.Random(seed), tmp_path)
        read += judge_folder(tmp_path) is not None
    assert count // 20 < read < count


def loose_json(data, name, fractions=False):
    return json.loads(data)


@pytest.mark.parametrize(
    ("name", "loose"),
    [
        ("_check_layout", lambda *_: None),
        ("_sizes", lambda _: True),
        ("parse_json", loose_json),
        ("HALVES", re.compile("^$")),
    ],
)
def test_a_reader_that_checks_less_is_found_out(monkeypatch, name, loose):
    monkeypatch.setattr(index, name, loose)
    with pytest.raises((AssertionError, TypeError, ValueError, SafetensorError)):
        judge_seeds(5000)


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="the coverage-guided fuzzer is not installed: `pip install atheris`",
)
@pytest.mark.parametrize(
    "limit",
    [
        "-runs=1000",
        pytest.param("-max_total_time=10", marks=pytest.mark.more),
        pytest.param("-runs=3000000", marks=pytest.mark.soak),
    ],
)
def test_what_a_guided_fuzzer_writes_ends_well(tmp_path, limit):
    script, root = Path(fuzz_headers.__file__), Path(index.__file__).parents[1]
    words = [sys.executable, str(script), "-seed=1", "-max_len=4096", "-print_final_stats=1", limit]
    words.append(str(tmp_path))
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = len(list(tmp_path.iterdir()))
    assert found > 10, "few paths were found: is the reader instrumented?"
