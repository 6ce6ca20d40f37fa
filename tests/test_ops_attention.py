"""attention over pages against a dense loop in float64 that knows neither pages nor blocks."""

from __future__ import annotations

import pytest
import torch
from paged import Pages

from tpx.batch import FULL, SLIDING
from tpx.ops import attention as op
from tpx.ops.attention import attention, write_cache

pytestmark = pytest.mark.usefixtures("both_ways")

WINDOW = 5


def dense(q_THD, k_SKD, v_SKD, window, sinks_H):
    """Query t is the token at position S - T + t. One softmax a query and head, by hand."""
    queries, heads, width = q_THD.shape
    group = heads // k_SKD.shape[1]
    out = torch.zeros(q_THD.shape, dtype=torch.float64)
    for t in range(queries):
        position = k_SKD.shape[0] - queries + t
        low = 0 if window is None else max(0, position - window + 1)
        for h in range(heads):
            k, v = (x[low : position + 1, h // group].double() for x in (k_SKD, v_SKD))
            scores = (k @ q_THD[t, h].double() / width**0.5).exp()
            total = scores.sum() + sinks_H[h].double().exp()
            out[t, h] = (scores / total) @ v
    return out


class Setting:
    """Sequences that grow by random q, k and v; checks each step against `dense`."""

    def __init__(self, heads=4, kv_heads=2, width=8, window=None, page=4, dtype=torch.float32):
        self.window, self.kind = window, FULL if window is None else SLIDING
        self.pages = Pages([self.kind], kv_heads, width, WINDOW, page, dtype=dtype)
        self.generator = torch.Generator().manual_seed(3)
        self.q_shape, self.kv_shape, self.dtype = (heads, width), (kv_heads, width), dtype
        self.sinks = self.random(heads)
        self.k, self.v = {}, {}

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def step(self, counts, tolerance=1e-6):
        batch = self.pages.step([[0] * n for n in counts])
        rows = sum(counts)
        q, k, v = (self.random(rows, *s) for s in (self.q_shape, self.kv_shape, self.kv_shape))
        write_cache(k, v, self.pages.caches[0], batch.slots_T[self.kind])
        got = attention(q, self.pages.caches[0], batch, self.window, self.sinks)
        assert got.shape == q.shape
        assert got.dtype == q.dtype
        start = 0
        for b, n in enumerate(counts):
            here = slice(start, start + n)
            self.k[b] = torch.cat([self.k.get(b, k[:0]), k[here]])
            self.v[b] = torch.cat([self.v.get(b, v[:0]), v[here]])
            expected = dense(q[here], self.k[b], self.v[b], self.window, self.sinks)
            torch.testing.assert_close(got[here].double(), expected, rtol=0, atol=tolerance)
            start += n
        return batch


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (8, 8)])
def test_prompts_of_different_lengths_then_chunks_then_single_tokens(window, heads, kv_heads):
    setting = Setting(heads, kv_heads, window=window)
    for counts in ([1, 7, 4, 13], [3, 1, 6, 2], *([[1, 1, 1, 1]] * 9), [1, 9, 1, 1]):
        setting.step(counts)


@pytest.mark.parametrize("page", [1, 2, 3, 16])
def test_any_page_size(page):
    setting = Setting(window=WINDOW, page=page)
    for counts in ([5, 11], [1, 1], [1, 1], [4, 1], [1, 1]):
        setting.step(counts)


def test_sliding_pages_that_left_the_window_are_gone_and_never_read():
    setting = Setting(window=WINDOW, page=2)
    for _ in range(14):
        batch = setting.step([1])
    # 14 tokens, window 5: positions 9 to 13 are seen, so pages of positions 0 to 7 are freed.
    assert (batch.tables_BN[SLIDING][0] < 0).tolist() == [True] * 4 + [False] * 3


def test_a_freed_page_inside_the_window_is_refused():
    setting = Setting(window=WINDOW, page=2)
    batch = setting.step([6])
    batch.tables_BN[SLIDING][0, 1] = -1
    q = setting.random(6, *setting.q_shape)
    with pytest.raises(AssertionError, match="freed pages"):
        attention(q, setting.pages.caches[0], batch, WINDOW, setting.sinks)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_blocks_of_queries_change_nothing(window, block, monkeypatch):
    monkeypatch.setattr(op, "QUERY_BLOCK", block)
    setting = Setting(window=window)
    for counts in ([10, 3], [7, 1]):
        setting.step(counts)


@pytest.mark.parametrize("counts", [[], [0], [0, 0], [0, 3, 0]])
def test_a_rank_without_tokens_and_sequences_without_new_ones(counts):
    Setting(window=WINDOW).step(counts)


def test_a_sequence_that_waits_keeps_its_cache():
    setting = Setting()
    setting.step([4, 4])
    setting.step([0, 2])
    setting.step([2, 1])


def test_bfloat16_is_rounded_only_at_its_ends():
    # o is a mean of values near 1, so half a unit in the last place is at most 2**-7.
    setting = Setting(dtype=torch.bfloat16)
    setting.step([9, 2], tolerance=2**-7)


def test_scores_of_thousands_do_not_overflow():
    setting = Setting()
    batch = setting.pages.step([[0] * 3])
    q, k, v = (setting.random(3, *s) for s in (setting.q_shape, *[setting.kv_shape] * 2))
    write_cache(1e3 * k, v, setting.pages.caches[0], batch.slots_T[FULL])
    got = attention(1e3 * q, setting.pages.caches[0], batch, None, setting.sinks)
    assert got.isfinite().all()
    # A sink far above all scores takes everything.
    low = attention(q, setting.pages.caches[0], batch, None, setting.sinks + 1e7)
    assert not low.any()


def test_the_gradient_reaches_queries_keys_values_and_sinks():
    setting = Setting(window=WINDOW)
    setting.step([6])
    batch = setting.pages.step([[0] * 3])
    cache = setting.pages.caches[0]
    saved = [x.clone() for x in cache]
    shapes = (setting.q_shape, setting.kv_shape, setting.kv_shape)
    inputs = [setting.random(3, *s).double().requires_grad_() for s in shapes]
    inputs.append(setting.sinks.double().requires_grad_())

    def run(q, k, v, sinks):
        fresh = type(cache)(*(x.double() for x in saved))
        write_cache(k, v, fresh, batch.slots_T[SLIDING])
        return attention(q, fresh, batch, WINDOW, sinks)

    assert torch.autograd.gradcheck(run, inputs)


def test_write_cache_fills_the_named_slots_alone():
    setting = Setting(page=3)
    cache = setting.pages.caches[0]
    k, v = setting.random(2, 2, 8), setting.random(2, 2, 8)
    write_cache(k, v, cache, torch.tensor([7, 2]))
    for new, pages in ((k, cache.k), (v, cache.v)):
        assert torch.equal(pages[2, 1], new[0])
        assert torch.equal(pages[0, 2], new[1])
        assert pages.isnan().all(-1).all(-1).sum() == pages.shape[0] * 3 - 2
