"""gpt-oss (openai/gpt-oss-20b, -120b): config.json -> ModelSpec -> Layout, and its collectives.

Names and shapes are those of the published checkpoints: experts packed in MXFP4, gate and up
interleaved, blocks of 32 values along the input dimension with one scale each. Also takes experts
stored plain, transposed as transformers holds them: [E, H, 2I] and [E, I, H].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..mesh import Mesh
from . import decoder, fields
from .family import Family
from .flow import Flow, Step, moe_steps
from .layout import Contradiction, Dim, Layout, Logical, Parameter, Source, whole
from .spec import ModelSpec, Rope
from .steps import ITEM_BYTES, Collective, Cut, DispatchName, MoE, moe_collectives, with_peers

BLOCK = 32  # values that share a scale in MXFP4
FLOATS = ("BF16", "F16", "F32")
PACKED = ("U8",)
LAYER_TYPES = ("sliding_attention", "full_attention")
ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
ROPE_KEYS |= {"beta_fast", "beta_slow", "truncate", "attention_factor"}


def spec(config: dict[str, Any]) -> ModelSpec:
    """The sizes in config.json, in any of its published forms. Raises CheckpointError."""
    hidden = fields.integer(config, "hidden_size")
    heads = fields.integer(config, "num_attention_heads")
    layers = fields.integer(config, "num_hidden_layers")
    head_dim = hidden // heads if config.get("head_dim", 64) is None else 64
    found = ModelSpec(
        model_type="gpt_oss",
        vocab_size=fields.integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer(config, "num_key_value_heads"),
        head_dim=fields.integer(config, "head_dim", default=head_dim),
        num_local_experts=fields.integer(config, "num_local_experts"),
        num_experts_per_tok=fields.integer(config, "num_experts_per_tok"),
        max_position_embeddings=fields.integer(config, "max_position_embeddings"),
        sliding_window=fields.integer(config, "sliding_window"),
        layer_types=_layer_types(config, layers),
        rms_norm_eps=fields.number(config, "rms_norm_eps", default=1e-5),
        rope=_rope(config),
        swiglu_alpha=fields.number(config, "swiglu_alpha", default=1.702),
        swiglu_limit=fields.number(config, "swiglu_limit", default=7.0),
        tie_word_embeddings=fields.flag(config, "tie_word_embeddings", default=False),
        dtype=_dtype(config),
        experts=_experts(config),
        eos_token_ids=fields.ids(config, "eos_token_id"),
    )
    _check(config, found)
    return found


def _layer_types(config: dict[str, Any], layers: int) -> Any:
    listed = config.get("layer_types")
    if listed is None:
        return tuple(LAYER_TYPES[i % 2] for i in range(layers))
    if not isinstance(listed, list) or any(kind not in LAYER_TYPES for kind in listed):
        raise fields.ill_typed(
            "layer_types", listed, "a list of `sliding_attention` and `full_attention`"
        )
    if len(listed) != layers:
        raise CheckpointError(
            f"`config.json` has {len(listed)} `layer_types` for num_hidden_layers {layers}",
            "give one a layer, or leave `layer_types` out: then they alternate, sliding first",
        )
    return tuple(listed)


def _rope(config: dict[str, Any]) -> Rope:
    """rope_parameters as transformers 5 writes them, else rope_scaling beside rope_theta."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.get(key)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise fields.ill_typed(key, rope, "an object")
    theta = fields.number(config | rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(k for k in rope.keys() - ROPE_KEYS if rope[k] is not None)
    if kind not in ("default", "yarn") or unknown:
        what = f"`{unknown[0]}`" if kind in ("default", "yarn") else f"rope_type `{kind}`"
        raise CheckpointError(
            f"`config.json` has {what} in `{key}`, which is not supported",
            "tpx computes rope_type `default` and `yarn`",
        )
    if kind == "default":
        return Rope(theta)
    return Rope(
        theta,
        factor=fields.number(rope, "factor", inside=key),
        original_max_position_embeddings=fields.integer(
            rope, "original_max_position_embeddings", inside=key
        ),
        beta_fast=fields.number(rope, "beta_fast", default=32.0),
        beta_slow=fields.number(rope, "beta_slow", default=1.0),
        truncate=fields.flag(rope, "truncate", default=True),
        attention_factor=fields.number(rope, "attention_factor")
        if rope.get("attention_factor") is not None
        else None,
    )


def _dtype(config: dict[str, Any]) -> Any:
    key = "torch_dtype" if config.get("dtype") is None and "torch_dtype" in config else "dtype"
    return fields.word(config, key, ITEM_BYTES)


def _experts(config: dict[str, Any]) -> Any:
    quantization = config.get("quantization_config")
    if quantization is None:
        return "plain"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "mxfp4":
        raise CheckpointError(
            f"`config.json` says quantization `{method}`, which is not supported",
            "tpx reads experts in `mxfp4`, or plain: without `quantization_config`",
        )
    return "mxfp4"


def _check(config: dict[str, Any], s: ModelSpec) -> None:
    """What no single key can say. Raises CheckpointError."""
    problem = None
    if s.num_attention_heads % s.num_key_value_heads:
        problem = (
            f"num_attention_heads {s.num_attention_heads}, which is no multiple of "
            f"num_key_value_heads {s.num_key_value_heads}"
        )
    elif s.head_dim % 2:
        problem = f"head_dim {s.head_dim}, which rotary embedding cannot halve"
    elif s.num_experts_per_tok > s.num_local_experts:
        problem = (
            f"num_experts_per_tok {s.num_experts_per_tok}, more than "
            f"num_local_experts {s.num_local_experts}"
        )
    elif not fields.flag(config, "attention_bias", default=True):
        problem = "attention_bias `False`, and gpt-oss attention has biases"
    elif config.get("hidden_act", "silu") != "silu":
        problem = f"hidden_act `{config['hidden_act']}`, and gpt-oss experts use `silu`"
    elif s.experts == "mxfp4":
        for key in ("hidden_size", "intermediate_size"):
            if getattr(s, key) % BLOCK and problem is None:
                problem = (
                    f"{key} {getattr(s, key)}, which is no multiple of MXFP4's block of {BLOCK}"
                )
    if problem:
        raise CheckpointError(f"`config.json` has {problem}", fields.WHOLE_FOLDER)


def layout(s: ModelSpec) -> Layout:
    """Every parameter of GptOssForCausalLM, in the checkpoint's names and order."""
    hidden = Dim("", s.hidden_size, key="hidden_size")
    table = Dim("V", s.vocab_size), hidden
    parameters = [whole("model.embed_tokens.weight", *table, dtypes=FLOATS)]
    for i in range(s.num_hidden_layers):
        parameters += _layer(s, f"model.layers.{i}", hidden)
    parameters.append(whole("model.norm.weight", hidden, dtypes=FLOATS))
    parameters.append(_head(s, hidden))
    return Layout(
        {dim.name: dim for dim in _logical(s)},
        {parameter.name: parameter for parameter in parameters},
        together=(("Q", "KV"),),
        ignored=("lm_head.weight",) if s.tie_word_embeddings else (),
        contradictions=(_contradiction(s),),
    )


def _logical(s: ModelSpec) -> list[Logical]:
    # Plain experts are cut where packed ones are, so that one plan serves both.
    unit = BLOCK if s.intermediate_size % BLOCK == 0 else 1
    dims = [
        Logical("V", "vocab_size", s.vocab_size, "tp", table=True, uneven="yes"),
        Logical("Q", "num_attention_heads", s.num_attention_heads, "tp"),
        Logical("KV", "num_key_value_heads", s.num_key_value_heads, "tp", replicable=True),
        Logical("E", "num_local_experts", s.num_local_experts, "ep"),
        Logical("I", "intermediate_size", s.intermediate_size, "etp", unit=unit, uneven="ask"),
    ]
    if not s.tie_word_embeddings:
        dims.append(Logical("V_head", "vocab_size", s.vocab_size, "tp", table=True, uneven="yes"))
    return dims


def _head(s: ModelSpec, hidden: Dim) -> Parameter:
    if not s.tie_word_embeddings:
        return whole("lm_head.weight", Dim("V_head", s.vocab_size), hidden, dtypes=FLOATS)
    shape = (s.vocab_size, s.hidden_size)
    embedding = "model.embed_tokens.weight"
    source = Source(embedding, (0, 0), shape, (0, 0))
    dims = (Dim("V", s.vocab_size), hidden)
    return Parameter("lm_head.weight", dims, FLOATS, (source,), tied_to=embedding)


def _layer(s: ModelSpec, prefix: str, hidden: Dim) -> list[Parameter]:
    attention = f"{prefix}.self_attn"
    query = Dim("Q", s.num_attention_heads, inner=s.head_dim)
    key = Dim("KV", s.num_key_value_heads, inner=s.head_dim)
    experts = Dim("", s.num_local_experts, key="num_local_experts")
    found = [whole(f"{prefix}.input_layernorm.weight", hidden, dtypes=FLOATS)]
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        found.append(whole(f"{attention}.{name}.weight", rows, hidden, dtypes=FLOATS))
        found.append(whole(f"{attention}.{name}.bias", rows, dtypes=FLOATS))
    return [
        *found,
        whole(f"{attention}.o_proj.weight", hidden, query, dtypes=FLOATS),
        whole(f"{attention}.o_proj.bias", hidden, dtypes=FLOATS, sums_over="Q"),
        whole(f"{attention}.sinks", Dim("Q", s.num_attention_heads), dtypes=FLOATS),
        whole(f"{prefix}.post_attention_layernorm.weight", hidden, dtypes=FLOATS),
        whole(f"{prefix}.mlp.router.weight", experts, hidden, dtypes=FLOATS),
        whole(f"{prefix}.mlp.router.bias", experts, dtypes=FLOATS),
        *_expert_parameters(s, f"{prefix}.mlp.experts"),
    ]


def _expert_parameters(s: ModelSpec, prefix: str) -> list[Parameter]:
    experts, hidden = Dim("E", s.num_local_experts), Dim("", s.hidden_size, key="hidden_size")
    gate_up, inner = Dim("I", s.intermediate_size, inner=2), Dim("I", s.intermediate_size)
    biases = [
        whole(f"{prefix}.gate_up_proj_bias", experts, gate_up, dtypes=FLOATS),
        whole(f"{prefix}.down_proj_bias", experts, hidden, dtypes=FLOATS, sums_over="I"),
    ]
    if s.experts == "plain":
        return [
            whole(f"{prefix}.gate_up_proj", experts, hidden, gate_up, dtypes=FLOATS),
            whole(f"{prefix}.down_proj", experts, inner, hidden, dtypes=FLOATS),
            *biases,
        ]
    hidden_blocks = Dim("", s.hidden_size, per=BLOCK, key="hidden_size")
    inner_blocks = Dim("I", s.intermediate_size, per=BLOCK)
    nibbles = Dim("", BLOCK // 2)
    up, down = (experts, gate_up, hidden_blocks), (experts, hidden, inner_blocks)
    return [
        whole(f"{prefix}.gate_up_proj_blocks", *up, nibbles, dtypes=PACKED),
        whole(f"{prefix}.gate_up_proj_scales", *up, dtypes=PACKED),
        whole(f"{prefix}.down_proj_blocks", *down, nibbles, dtypes=PACKED),
        whole(f"{prefix}.down_proj_scales", *down, dtypes=PACKED),
        *biases,
    ]


def _contradiction(s: ModelSpec) -> Contradiction:
    """Experts that are not stored as config.json says."""
    experts = "model.layers.*.mlp.experts"
    if s.experts == "mxfp4":
        return Contradiction(
            f"{experts}.{{gate_up,down}}_proj",
            "`config.json` says that experts are stored in `mxfp4`",
            "remove `quantization_config` from `config.json` if the experts are plain",
        )
    return Contradiction(
        f"{experts}.{{gate_up,down}}_proj_{{blocks,scales}}",
        "`config.json` has no `quantization_config`, so experts are stored plain",
        'add `"quantization_config": {"quant_method": "mxfp4"}` if the experts are packed',
    )


def collectives(
    s: ModelSpec, mesh: Mesh, cuts: Mapping[str, Cut], dispatch: DispatchName
) -> tuple[Collective, ...]:
    """One forward: embedding, then attention and experts in each layer, then the head."""
    item = ITEM_BYTES[s.dtype]
    head = cuts["V" if s.tie_word_embeddings else "V_head"]
    moe = MoE(s.hidden_size, s.num_experts_per_tok, s.num_local_experts, item)
    before = [
        (cuts["V"], Collective("embed", "all_reduce", "tp", s.hidden_size, item, False)),
        (cuts["Q"], Collective("attention", "all_reduce", "tp", s.hidden_size, item, True)),
    ]
    after = [(head, Collective("head", "all_gather", "tp", head.size, item, False))]
    first, last = (
        with_peers(mesh, tuple(step for cut, step in steps if cut.axis is not None))
        for steps in (before, after)
    )
    return (*first, *moe_collectives(mesh, moe, dispatch), *last)


def flow(s: ModelSpec, dispatch: DispatchName) -> Flow:
    """What the model's module computes: attention with sinks, then experts."""
    at = f"{decoder.LAYER}.mlp"
    ends = ("",) if s.experts == "plain" else ("_blocks", "_scales")
    experts = moe_steps(dispatch, decoder.experts(f"{at}.experts", ends))
    normed = decoder.norm("x", f"{decoder.LAYER}.post_attention_layernorm")
    mlp = (normed, *decoder.router(f"{at}.router"), *experts, Step("add", "h", ("h", "sum")))
    head = decoder.head("V" if s.tie_word_embeddings else "V_head")
    return Flow(decoder.embedding(), (*decoder.attention("sinks"), *mlp), head)


FAMILY = Family("gpt_oss", spec, layout, collectives, flow)
