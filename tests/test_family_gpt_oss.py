"""gpt-oss: every published form of config.json, every mistake in one, and the layout."""

from __future__ import annotations

import pytest
from headers import layout_of, make_config

from tpx.errors import CheckpointError
from tpx.families import family_of, fields
from tpx.families.spec import Rope
from tpx.families.steps import MoE, ranks_reached


def spec(**changes):
    config = make_config(**changes)
    return family_of(config).spec(config)


ROPE = {"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}


def test_both_forms_of_config_say_the_same():
    old = spec()
    rope = ROPE | {"rope_type": "yarn", "rope_theta": 150000.0, "beta_fast": 32, "beta_slow": 1}
    new = spec(
        rope_theta=None, rope_scaling=None, rope_parameters=rope, torch_dtype=None, dtype="bfloat16"
    )
    assert old == new
    assert old.rope == Rope(150000.0, 4.0, 64, 32.0, 1.0, False)


def test_what_a_config_may_leave_out():
    found = spec()
    assert found.layer_types == ("sliding_attention", "full_attention")
    assert (found.swiglu_alpha, found.swiglu_limit) == (1.702, 7.0)
    assert found.tie_word_embeddings is False
    assert spec(head_dim=None).head_dim == 64
    config = make_config() | {"head_dim": None}
    assert family_of(config).spec(config).head_dim == 64 // 8
    assert spec(swiglu_alpha=1.5, swiglu_limit=5.0).swiglu_alpha == 1.5
    assert spec(rope_scaling=None).rope == Rope(150000.0)
    assert spec(quantization_config=None).experts == "plain"
    assert spec(layer_types=["full_attention"] * 2).layer_types == ("full_attention",) * 2


@pytest.mark.parametrize(
    ("said", "found"), [(2, (2,)), ([7, 9], (7, 9)), (None, ())], ids=["int", "list", "absent"]
)
def test_stop_tokens_are_a_number_a_list_or_absent(said, found):
    assert spec(eos_token_id=said).eos_token_ids == found


REQUIRED = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
    "sliding_window", "rope_theta",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named_with_its_file(key):
    with pytest.raises(CheckpointError) as error:
        spec(**{key: None})
    assert error.value.message == f"`config.json` has no `{key}`"
    assert error.value.hint == fields.WHOLE_FOLDER
    assert error.value.exit_code == 3


def test_a_missing_dtype_is_named_as_the_file_would_have_it():
    with pytest.raises(CheckpointError) as error:
        spec(torch_dtype=None)
    assert error.value.message == "`config.json` has no `dtype`"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": "64"},
            "`config.json` has `hidden_size` = `64`, which is not a whole number of 1 or more",
        ),
        (
            {"num_local_experts": True},
            "`config.json` has `num_local_experts` = `True`, which is not a whole number of 1 "
            "or more",
        ),
        (
            {"rope_theta": -1},
            "`config.json` has `rope_theta` = `-1`, which is not a number above 0",
        ),
        (
            {"swiglu_limit": float("nan")},
            "`config.json` has `swiglu_limit` = `nan`, which is not a number above 0",
        ),
        (
            {"tie_word_embeddings": "no"},
            "`config.json` has `tie_word_embeddings` = `no`, which is not `true` or `false`",
        ),
        (
            {"torch_dtype": "float8"},
            "`config.json` has `torch_dtype` = `float8`, which is not `bfloat16`, `float16` or "
            "`float32`",
        ),
        (
            {"eos_token_id": "</s>"},
            "`config.json` has `eos_token_id` = `</s>`, which is not a token id or a list of "
            "token ids",
        ),
        (
            {"layer_types": ["full_attention"]},
            "`config.json` has 1 `layer_types` for num_hidden_layers 2",
        ),
        (
            {"layer_types": ["linear", "full_attention"]},
            "`config.json` has `layer_types` = `['linear', 'full_attention']`, which is not a list "
            "of `sliding_attention` and `full_attention`",
        ),
        ({"rope_scaling": [1]}, "`config.json` has `rope_scaling` = `[1]`, which is not an object"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "`config.json` has no `factor` in `rope_scaling`",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "`config.json` has rope_type `longrope` in `rope_scaling`, which is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0}},
            "`config.json` has `mscale` in `rope_scaling`, which is not supported",
        ),
        (
            {"num_key_value_heads": 3},
            "`config.json` has num_attention_heads 8, which is no multiple of "
            "num_key_value_heads 3",
        ),
        ({"head_dim": 15}, "`config.json` has head_dim 15, which rotary embedding cannot halve"),
        (
            {"num_experts_per_tok": 9},
            "`config.json` has num_experts_per_tok 9, more than num_local_experts 8",
        ),
        (
            {"attention_bias": False},
            "`config.json` has attention_bias `False`, and gpt-oss attention has biases",
        ),
        (
            {"hidden_act": "gelu"},
            "`config.json` has hidden_act `gelu`, and gpt-oss experts use `silu`",
        ),
        (
            {"intermediate_size": 100},
            "`config.json` has intermediate_size 100, which is no multiple of MXFP4's block of 32",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "`config.json` says quantization `gptq`, which is not supported",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named(changes, message):
    with pytest.raises(CheckpointError) as error:
        spec(**changes)
    assert error.value.message == message


def test_another_quantization_says_what_is_supported():
    with pytest.raises(CheckpointError) as error:
        spec(quantization_config={"quant_method": "fp8"})
    assert (
        error.value.hint == "tpx reads experts in `mxfp4`, or plain: without `quantization_config`"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "`config.json` has model_type `llama`, which is not supported"),
        ({"model_type": ["x"]}, "`config.json` has model_type `['x']`, which is not supported"),
        ({}, "`config.json` has no `model_type`"),
    ],
)
def test_another_model_lists_the_supported_ones(config, message):
    with pytest.raises(CheckpointError) as error:
        family_of(config)
    assert error.value.message == message
    assert error.value.hint == "tpx runs checkpoints of model_type `gpt_oss`"


def test_the_layout_is_what_the_published_20b_holds():
    import gzip
    import json
    from pathlib import Path

    stored = Path(__file__).parent / "data" / "gpt-oss-20b.json.gz"
    found = json.loads(gzip.decompress(stored.read_bytes()))
    wanted = {
        name: (entry["dtype"], tuple(entry["shape"]))
        for file in found["files"]
        for name, entry in file["header"].items()
        if name != "__metadata__"
    }
    parameters = layout_of(found["config"]).parameters
    assert {name: (p.dtypes[0], p.shape) for name, p in parameters.items()} == wanted


def test_plain_experts_are_transposed_and_cut_in_the_same_blocks():
    packed, plain = layout_of(make_config()), layout_of(make_config(quantization_config=None))
    experts = "model.layers.0.mlp.experts"
    assert plain.parameters[f"{experts}.gate_up_proj"].shape == (8, 64, 192)
    assert plain.parameters[f"{experts}.down_proj"].shape == (8, 96, 64)
    assert packed.parameters[f"{experts}.down_proj_blocks"].shape == (8, 64, 3, 16)
    assert packed.dims["I"] == plain.dims["I"]
    assert (
        layout_of(make_config(quantization_config=None, intermediate_size=100)).dims["I"].unit == 1
    )


def test_a_tied_head_shares_the_embedding():
    layout = layout_of(make_config(tie_word_embeddings=True))
    assert layout.parameters["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert "V_head" not in layout.dims


def test_ranks_reached_is_the_share_of_choices_that_hit_a_rank():
    # gpt-oss, top-4, uniform routing: by enumeration 1.88, 2.75 and 3.34 ranks
    moe = MoE(hidden=2880, top_k=4, experts=128, itemsize=2)
    assert [round(ranks_reached(moe, ep), 2) for ep in (1, 2, 4, 8)] == [1.0, 1.88, 2.75, 3.34]
