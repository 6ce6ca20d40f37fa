"""Self-attention with this rank's heads: projections, rotary positions, cache, sinks.

Knows which heads are local and the group that shares the others; not how pages are given out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import FULL, SLIDING, Batch, KVCache
from ..comm import Group
from ..ops.attention import attention, is_fused, rope_attention, write_cache
from ..ops.joined import joined
from ..ops.kernel import REFERENCE, Kernels
from ..ops.linear import linear
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
        kernels: Kernels = REFERENCE,
    ):
        super().__init__()
        assert heads % kv_heads == 0, f"{heads=} {kv_heads=}"
        self.window = window
        self.q_shape, self.kv_shape = (heads, head_dim), (kv_heads, head_dim)
        self.kind = FULL if window is None else SLIDING
        self.q_proj = Colwise(hidden, heads * head_dim, group, dtype, kernels)
        self.k_proj = Colwise(hidden, kv_heads * head_dim, group, dtype, kernels)
        self.v_proj = Colwise(hidden, kv_heads * head_dim, group, dtype, kernels)
        self.o_proj = Rowwise(heads * head_dim, hidden, group, "attention", dtype, kernels)
        self.sinks = nn.Parameter(torch.empty(heads, dtype=dtype))
        self.kernel = kernels.get("attention")
        self.qkv: tuple[Tensor, Tensor] | None = None  # weights and biases, joined

    def prepare(self) -> None:
        """Joins the three projections, once after loading, where the kernel takes them so."""
        if is_fused(self.kernel):
            three = (self.q_proj, self.k_proj, self.v_proj)
            self.qkv = joined([p.weight for p in three]), joined([p.bias for p in three])

    def forward(
        self,
        h_TD: Tensor,
        residual_TD: Tensor,
        batch: Batch,
        cache: KVCache,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """out_TD with the residual, the same on the whole group. Writes the tokens' keys and values
        to the cache. cos, sin: rope_tables of the batch's positions."""
        attend = self._separate if self.qkv is None else self._fused
        o_THD = attend(h_TD, batch, cache, cos, sin)
        out_TD: Tensor = self.o_proj(o_THD.flatten(1), residual_TD)
        return out_TD

    def _separate(
        self, h_TD: Tensor, batch: Batch, cache: KVCache, cos: Tensor, sin: Tensor
    ) -> Tensor:
        tokens = h_TD.shape[0]
        q_THD = apply_rope(self.q_proj(h_TD).view(tokens, *self.q_shape), cos, sin)
        k_TKD = apply_rope(self.k_proj(h_TD).view(tokens, *self.kv_shape), cos, sin)
        v_TKD = self.v_proj(h_TD).view(tokens, *self.kv_shape)
        write_cache(k_TKD, v_TKD, cache, batch.slots_T[self.kind])
        return attention(q_THD, cache, batch, self.window, self.sinks, self.kernel)

    def _fused(
        self, h_TD: Tensor, batch: Batch, cache: KVCache, cos: Tensor, sin: Tensor
    ) -> Tensor:
        assert self.qkv is not None
        qkv_TX = linear(h_TD, *self.qkv, kernel=self.q_proj.kernel)
        return rope_attention(qkv_TX, cos, sin, cache, batch, self.window, self.sinks, self.kernel)
