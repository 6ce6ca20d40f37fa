"""gpt-oss (arXiv 2508.10925) from layers: sliding and full attention, then a mixture of experts.

Parameters have the checkpoint's names. Knows this rank's cuts and groups; reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..batch import Batch, KVCache
from ..comm import Group, Groups
from ..families.spec import ModelSpec
from ..layers.attention import Attention
from ..layers.embedding import VocabEmbedding, VocabHead
from ..layers.norm import RMSNorm
from ..moe.layer import MoELayer
from ..ops.kernel import REFERENCE, Kernels
from ..ops.rope import attention_factor, rope_frequencies, rope_tables
from ..plan.types import RankPlan


def build(
    spec: ModelSpec,
    rank_plan: RankPlan,
    groups: Groups,
    dtype: torch.dtype,
    kernels: Kernels = REFERENCE,
) -> GptOss:
    """The module of one rank, with parameters of the rank's own shapes and no values yet. Call it
    under torch.device("meta"), then load_state_dict(..., assign=True) and prepare()."""
    return GptOss(spec, rank_plan, groups, dtype, kernels)


class GptOss(nn.Module):
    """forward(batch, caches) -> logits. Weights are frozen: gradients flow to what is put
    between layers (adapters), through every collective."""

    def __init__(
        self,
        spec: ModelSpec,
        rank_plan: RankPlan,
        groups: Groups,
        dtype: torch.dtype,
        kernels: Kernels,
    ):
        super().__init__()
        self.model = Decoder(spec, rank_plan, groups, dtype, kernels)
        head = "V" if spec.tie_word_embeddings else "V_head"
        group = group_of(head, rank_plan, groups)
        self.lm_head = VocabHead(spec.vocab_size, spec.hidden_size, group, dtype, kernels)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.requires_grad_(False)

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """logits [M, V] float32 for batch.logits_at, whole on every rank. caches: one a layer, with
        this rank's key heads; the batch's tokens are written to them."""
        logits_MV: Tensor = self.lm_head(self.model(batch, caches))
        return logits_MV


class Decoder(nn.Module):
    """Embedding, layers, and the norm of the rows whose logits are wanted."""

    rope_frequencies: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        rank_plan: RankPlan,
        groups: Groups,
        dtype: torch.dtype,
        kernels: Kernels,
    ):
        super().__init__()
        _, start, stop = rank_plan.cuts["V"]
        group = group_of("V", rank_plan, groups)
        self.embed_tokens = VocabEmbedding(start, stop, spec.hidden_size, group, dtype)
        windows = (
            spec.sliding_window if kind == "sliding_attention" else None
            for kind in spec.layer_types
        )
        self.layers = nn.ModuleList(
            DecoderLayer(spec, rank_plan, groups, dtype, kernels, window) for window in windows
        )
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype, kernels)
        self.rope_factor = attention_factor(spec.rope)
        frequencies = rope_frequencies(spec.rope, spec.head_dim)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)
        self.positions = spec.max_position_embeddings if kernels else 0
        self.rope: tuple[Tensor, Tensor] | None = None  # of all positions

    def prepare(self) -> None:
        """Moves what no checkpoint holds to the parameters' device, once after loading; computes
        the rope tables where looking them up saves launches."""
        where, dtype = self.norm.weight.device, self.norm.weight.dtype
        self.rope_frequencies = self.rope_frequencies.to(where)
        if self.positions:
            every = torch.arange(self.positions, device=where)
            self.rope = rope_tables(every, self.rope_frequencies, self.rope_factor, dtype)

    def _rope(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return rope_tables(positions_T, self.rope_frequencies, self.rope_factor, dtype)
        cos, sin = self.rope
        return cos.index_select(0, positions_T), sin.index_select(0, positions_T)

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        x_TD = self.embed_tokens(batch.ids_T)
        cos, sin = self._rope(batch.positions_T, x_TD.dtype)
        layers = cast(Sequence[DecoderLayer], self.layers)
        norms = [*(layer.input_layernorm for layer in layers), self.norm]
        h_TD = norms[0](x_TD)
        for layer, after, cache in zip(layers, norms[1:], caches, strict=True):
            x_TD, h_TD = layer(x_TD, h_TD, after, batch, cache, cos, sin)
        h_MD: Tensor = h_TD.index_select(0, batch.logits_at)
        return h_MD


class DecoderLayer(nn.Module):
    def __init__(
        self,
        spec: ModelSpec,
        rank_plan: RankPlan,
        groups: Groups,
        dtype: torch.dtype,
        kernels: Kernels,
        window: int | None,
    ):
        super().__init__()
        cuts = rank_plan.cuts
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype, kernels)
        self.self_attn = Attention(
            spec.hidden_size,
            cuts["Q"].size,
            cuts["KV"].size,
            spec.head_dim,
            window,
            group_of("Q", rank_plan, groups),
            dtype,
            kernels,
        )
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype, kernels)
        self.mlp = MoELayer(spec, rank_plan, groups, dtype, kernels)

    def forward(
        self,
        x_TD: Tensor,
        h_TD: Tensor,
        after: RMSNorm,
        batch: Batch,
        cache: KVCache,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x with what the layer adds, and its norm by `after`, the norm of what comes next, so that
        one kernel does both. h_TD: x normed by input_layernorm."""
        x_TD = self.self_attn(h_TD, x_TD, batch, cache, cos, sin)
        found: tuple[Tensor, Tensor] = self.mlp(x_TD, batch, self.post_attention_layernorm, after)
        return found


def group_of(logical: str, rank_plan: RankPlan, groups: Groups) -> Group:
    """The ranks that a logical dimension is cut over: this one alone where it is whole."""
    axis = rank_plan.cuts[logical].axis
    return groups.none if axis is None else groups[axis]
