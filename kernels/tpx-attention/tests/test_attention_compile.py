"""Every kernel compiles for every architecture; on sm_90 within a budget and without a spill."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.more

# Registers a thread on sm_90 at most: what keeps enough programs on a multiprocessor.
REGISTERS = {
    "gemv 1": 96,
    "gemv 4": 176,
    "skinny 8": 80,
    "skinny 16": 96,
    "decode window": 224,
    "decode full": 224,
    "prefill window": 168,
    "prefill full": 144,
    "search": 168,
    "tally": 168,
    "draw": 255,
}


OTHERS = [(75, "fp16"), (80, "bf16"), (86, "bf16"), (89, "bf16"), (100, "bf16")]
HOPPER = (90, "bf16")


@functools.cache
def jobs() -> dict[tuple[int, str], Future]:
    """All at once: each is a process of one core."""
    pool = ThreadPoolExecutor(os.cpu_count())
    return {case: pool.submit(compiled, *case) for case in (HOPPER, *OTHERS)}


def compiled(capability: int, dtype: str) -> dict[str, dict[str, int]]:
    script = Path(__file__).parent / "compile_attention.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, str(capability), dtype],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("name"): line for line in map(json.loads, done.stdout.splitlines())}


def test_hopper_within_budget():
    found = jobs()[HOPPER].result()
    assert {
        name: found[name]["registers"]
        for name in REGISTERS
        if found[name]["registers"] > REGISTERS[name]
    } == {}
    assert [name for name, what in found.items() if what["stack"]] == []
    assert found["gemv 1"]["wide_loads"] >= 12  # 3 tiles of 4 rows, each 16 bytes a thread


@pytest.mark.parametrize("case", OTHERS)
def test_compiles(case):
    assert len(jobs()[case].result()) == 17
