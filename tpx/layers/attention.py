"""Self-attention with this rank's heads: projections, rotary positions, cache, sinks.

Knows which heads are local and the group that shares the others; not how pages are given out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import FULL, SLIDING, Batch, KVCache
from ..comm import Group
from ..ops.attention import attention, write_cache
from ..ops.rope import apply_rope
from .linear import Colwise, Rowwise


class Attention(nn.Module):
    """heads, kv_heads: those of this rank. Query head h reads key head h // (heads / kv_heads).

    Where the group is larger than the number of key heads, ranks of a run hold the same key head.
    window: tokens that a query sees, itself included; None: all before it.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None,
        group: Group,
        dtype: torch.dtype,
    ):
        super().__init__()
        assert heads % kv_heads == 0, f"{heads=} {kv_heads=}"
        self.window = window
        self.q_shape, self.kv_shape = (heads, head_dim), (kv_heads, head_dim)
        self.kind = FULL if window is None else SLIDING
        self.q_proj = Colwise(hidden, heads * head_dim, group, dtype)
        self.k_proj = Colwise(hidden, kv_heads * head_dim, group, dtype)
        self.v_proj = Colwise(hidden, kv_heads * head_dim, group, dtype)
        self.o_proj = Rowwise(heads * head_dim, hidden, group, "attention", dtype)
        self.sinks = nn.Parameter(torch.empty(heads, dtype=dtype))

    def forward(
        self, h_TD: Tensor, batch: Batch, cache: KVCache, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """out_TD without the residual, the same on the whole group. Writes the tokens' keys and
        values to the cache. cos, sin: rope_tables of the batch's positions."""
        tokens = h_TD.shape[0]
        q_THD = apply_rope(self.q_proj(h_TD).view(tokens, *self.q_shape), cos, sin)
        k_TKD = apply_rope(self.k_proj(h_TD).view(tokens, *self.kv_shape), cos, sin)
        v_TKD = self.v_proj(h_TD).view(tokens, *self.kv_shape)
        write_cache(k_TKD, v_TKD, cache, batch.slots_T[self.kind])
        o_THD = attention(q_THD, cache, batch, self.window, self.sinks)
        out_TD: Tensor = self.o_proj(o_THD.flatten(1))
        return out_TD
