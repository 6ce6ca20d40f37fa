"""The operations as torch and a caller see them, on the CPU: schemas, fakes, no triton needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tpx_attention
from attention_cases import angles, new_rows, paged

CHECKS = ("test_schema", "test_faketensor")


def calls():
    case = paged([1, 1], [9, 5], window=4)
    qkv, turn = new_rows(case), angles(2, 16)
    cache = (case.k.nan_to_num(), case.v.nan_to_num())
    rows = torch.ones(2, dtype=torch.float64)
    logits = (torch.randn(2, 20), rows, rows.long(), rows * 0.5, rows * 0.5)
    x, weight = torch.randn(2, 8), torch.randn(6, 8)
    ends = (torch.randn(6), torch.randn(2, 6), torch.randn(8), 1e-5, torch.float64)
    yield tpx_attention.linear_decode, (x, weight, *ends)
    yield tpx_attention.linear_decode, (x, weight)
    yield tpx_attention.rope_write, (qkv, *turn, case.slots, *cache)
    yield tpx_attention.decode_attention, (case.q_THD, *cache, *case.lookup)
    yield tpx_attention.rope_write_attention, (qkv, *turn, case.slots, *cache, *case.lookup)
    yield tpx_attention.prefill_attention, (case.q_THD, *cache, *case.batch, case.sinks, 4)
    yield tpx_attention.sample, logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_schemas_and_fakes_agree_with_what_runs():
    for operation, arguments in calls():
        registered = getattr(torch.ops.tpx_attention, operation.__name__).default
        torch.library.opcheck(registered, arguments, test_utils=CHECKS)


def test_self_test_is_clean_where_the_references_run():
    sizes = {"heads": 4, "kv": 2, "width": 16, "window": 20, "dtype": torch.float32}
    errors = tpx_attention.self_test(torch.device("cpu"), ((24, 32),), **sizes)
    assert sorted(errors) == [
        "decode_attention",
        "linear_decode 24x32",
        "prefill_attention",
        "rope_write_attention",
        "sample",
    ]
    assert all(error == 0 for error in errors.values())


@pytest.mark.more
def test_works_without_triton_and_imports_no_compiler():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(tpx_attention.__file__).parents[1])!r})\n"
        "sys.modules['triton'] = None\n"
        "import torch, tpx_attention\n"
        "print(tpx_attention.linear_decode(torch.ones(1, 4), torch.ones(2, 4)).tolist())\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[[4.0, 4.0]]\nFalse\n", done.stderr
