"""A foreign attention kernel by FlashAttention's interface, against the reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paged import Pages

from tpx.batch import FULL, SLIDING
from tpx.ops.attention import attention, write_cache

WINDOW, HEADS, KV, WIDTH = 6, 4, 2, 8


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    block_table: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of vllm-flash-attn 3, as much as is called: query i of a sequence sees keys from i - left."""
    assert causal
    assert cu_seqlens_k is None
    out = torch.empty_like(q)
    for b, used in enumerate(seqused_k.tolist()):
        rows = slice(*cu_seqlens_q[b : b + 2].tolist())
        count = rows.stop - rows.start
        assert count <= max_seqlen_q
        assert used <= max_seqlen_k
        keys, values = (x[block_table[b]].flatten(0, 1)[:used] for x in (k, v))
        position = torch.arange(used - count, used)[:, None]
        ahead = position - torch.arange(used)
        seen = (ahead >= 0) & ((ahead <= window_size[0]) | (window_size[0] < 0))
        for head in range(q.shape[1]):
            own = head // (q.shape[1] // k.shape[2])
            keep = torch.where(seen.any(0)[:, None], keys[:, own], 0.0)  # freed pages hold NaN
            kept = torch.where(seen.any(0)[:, None], values[:, own], 0.0)
            scores = (q[rows, head] @ keep.T * softmax_scale).masked_fill(~seen, -torch.inf)
            sink = s_aux[head].expand(count, 1)
            out[rows, head] = torch.cat([scores, sink], 1).softmax(1)[:, :-1] @ kept
    return out


KERNEL: Any = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_it_gives_what_the_reference_gives(window):
    kind = FULL if window is None else SLIDING
    pages = Pages([kind], KV, WIDTH, WINDOW)
    make = torch.Generator().manual_seed(1)
    sinks = torch.randn(HEADS, generator=make)
    for counts in ([9, 1, 4], [1, 3, 2], [1, 1, 1], [1, 1, 1]):
        batch = pages.step([[0] * n for n in counts])
        tokens = sum(counts)
        q, k, v = (torch.randn(tokens, heads, WIDTH, generator=make) for heads in (HEADS, KV, KV))
        write_cache(k, v, pages.caches[0], batch.slots_T[kind])
        given = q, pages.caches[0], batch, window, sinks
        torch.testing.assert_close(attention(*given, KERNEL), attention(*given))


def test_a_rank_without_a_token_does_not_call_it():
    pages = Pages([FULL], KV, WIDTH, WINDOW)
    q = torch.empty(0, HEADS, WIDTH)
    broken: Any = SimpleNamespace()
    given = q, pages.caches[0], pages.step([]), None, torch.zeros(HEADS)
    assert attention(*given, broken).shape == (0, HEADS, WIDTH)
