"""Attention kernels under triton's interpreter against the reference; what no query sees is NaN."""

from __future__ import annotations

import pytest
import torch
from attention_cases import angles, error, new_rows, paged
from tpx_attention import attention as ops, reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

DECODE = {"block": 16, "splits": 1, "programs": 99, "warps": 1, "combine_warps": 1}
PREFILL = {"block_m": 16, "block_n": 16, "warps": 1, "stages": 1}


def split(splits, block=16):
    return {**DECODE, "splits": splits, "block": block}


@pytest.mark.parametrize("window", [None, 4, 9], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_over_pages(window, splits):
    lengths = [1, 33, 0]
    case = paged([1] * 3, [n or 1 for n in lengths], window)
    case.lengths[2] = 0  # a row of a padded batch
    got = ops.launch_decode(case.q_THD, None, case.k, case.v, case.lookup, False, split(splits))
    expected = reference.attention(
        case.q_THD, case.k, case.v, case.starts, case.lengths, case.tables, case.sinks, window
    )
    assert error(got, expected) < 2e-6
    assert not got[2].any()


def test_decode_at_the_window_of_the_model():
    case = paged([1, 1, 1], [128, 129, 130], window=128, heads=8, kv=1, page=16)
    got = ops.launch_decode(case.q_THD, None, case.k, case.v, case.lookup, True, split(2, 32))
    expected = reference.decode_attention(
        case.q_THD, case.k, case.v, case.tables, case.lengths, case.sinks, 128
    )
    assert error(got, expected) < 2e-6


@pytest.mark.parametrize(
    ("window", "splits", "early"), [(None, 2, False), (None, 1, True), (5, 1, False), (5, 2, True)]
)
def test_new_token_is_turned_written_and_attended(window, splits, early):
    case = paged([1] * 3, [1, 30, 4], window, heads=6)
    case.lengths[2] = 0
    qkv, (cos, sin) = new_rows(case), angles(3, 16)
    kept = [x.clone() for x in (case.k, case.v)]
    new = (cos, sin, case.slots)
    got = ops.launch_decode(qkv, new, case.k, case.v, case.lookup, early, split(splits))
    expected = ops.rope_write_attention(qkv, *new, *kept, *case.lookup)
    assert error(got, expected) < 2e-6
    for mine, theirs in zip((case.k, case.v), kept, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, equal_nan=True)


def test_float8_cache_holds_the_nearest_number_and_no_nan():
    case = paged([1, 1], [9, 5], cache_dtype=torch.float8_e4m3fn)
    qkv, (cos, sin) = new_rows(case) * 300, angles(2, 16)
    kept = [x.clone() for x in (case.k, case.v)]
    new = (cos, sin, case.slots)
    got = ops.launch_decode(qkv, new, case.k, case.v, case.lookup, False, DECODE)
    expected = ops.rope_write_attention(qkv, *new, *kept, *case.lookup)
    assert error(got, expected) < 2e-6
    assert case.v.float().nan_to_num(0).abs().max() == 448


ROPES = [(1, 1), (1, 2), (4, 1), (2, 2)]


@pytest.mark.parametrize(("tokens", "heads"), ROPES)
def test_rope_write_skips_negative_slots(tokens, heads):
    case = paged([4, 1], [7, 2], heads=6)
    make = torch.Generator().manual_seed(1)
    qkv, (cos, sin) = torch.randn(5, 10 * 16, generator=make), angles(5, 16)
    slots = case.slots.clone()
    slots[1] = -1
    kept = [x.clone() for x in (case.k, case.v)]
    config = {"tokens": tokens, "heads": heads, "warps": 1}
    got = ops.launch_rope_write(qkv, cos, sin, slots, case.k, case.v, config)
    torch.testing.assert_close(got, reference.rope_write(qkv, cos, sin, slots, *kept))
    for mine, theirs in zip((case.k, case.v), kept, strict=False):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("window", [None, 3, 20], ids=str)
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        pytest.param([19], [19], id="prefill"),
        pytest.param([9, 0], [40, 5], id="after a prefix"),
        pytest.param([1, 7, 1], [18, 7, 1], id="mixed with decode"),
        pytest.param([1], [1], id="one token"),
    ],
)
def test_prefill_of_ragged_batches(counts, lengths, window):
    case = paged(counts, lengths, window, heads=6)
    got = ops.launch_prefill(case.q_THD, case.k, case.v, case.batch, case.sinks, window, PREFILL)
    expected = reference.attention(case.q_THD, case.k, case.v, *case.batch, case.sinks, window)
    assert error(got, expected) < 2e-6


def test_prefill_and_decode_agree_on_decode():
    case = paged([1] * 2, [5, 44])
    a = ops.launch_prefill(case.q_THD, case.k, case.v, case.batch, case.sinks, None, PREFILL)
    b = ops.launch_decode(case.q_THD, None, case.k, case.v, case.lookup, False, split(4))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_empty_batches():
    case = paged([], [])
    for got in (
        ops.launch_prefill(case.q_THD, case.k, case.v, case.batch, case.sinks, None, PREFILL),
        ops.launch_decode(case.q_THD, None, case.k, case.v, case.lookup, False, DECODE),
    ):
        assert got.shape == (0, 4, 16)


def test_splits_fill_the_device_and_never_go_below_a_block():
    config = {"block": 64, "splits": 32, "programs": 264}
    assert [ops.splits_for(b, 8, 1 << 17, config) for b in (1, 2, 8, 64)] == [32, 16, 4, 1]
    assert ops.splits_for(1, 8, 128, config) == 2
