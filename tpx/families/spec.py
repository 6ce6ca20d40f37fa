"""ModelSpec: what config.json says, in Hugging Face's names, whatever form the file has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding with YaRN (arXiv 2309.00071); factor 1 is plain RoPE."""

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model's sizes. Names are those of Hugging Face's config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    sliding_window: int
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...]
    rms_norm_eps: float
    rope: Rope
    swiglu_alpha: float
    swiglu_limit: float
    tie_word_embeddings: bool
    dtype: Literal["bfloat16", "float16", "float32"]
    experts: Literal["mxfp4", "plain"]  # how the checkpoint stores the experts' weights
    eos_token_ids: tuple[int, ...]
