"""Checkpoints that are headers and holes: every size, no bytes, no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from tpx.families import family_of
from tpx.families.layout import Layout
from tpx.index import DTYPE_BITS

Config = dict[str, Any]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

CONFIG: Config = {
    "model_type": "gpt_oss",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "sliding_window": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "quantization_config": {"quant_method": "mxfp4"},
}


def make_config(**changes: Any) -> Config:
    """CONFIG with changes; None removes a key."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not None}


def layout_of(config: Config) -> Layout:
    family = family_of(config)
    return family.layout(family.spec(config))


def tensors_of(config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a checkpoint of this config holds: name -> (dtype, shape)."""
    return {
        parameter.name: (parameter.dtypes[0], parameter.shape)
        for parameter in layout_of(config).parameters.values()
        if parameter.tied_to is None
    }


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    return header


def write_header(path: Path, header: Any, data: int | None = None) -> None:
    """A safetensors file: this header (bytes, or what becomes JSON), `data` bytes of hole."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if data is None:
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key[0] != "_"]
        data = max(ends, default=0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + data)


def write_folder(
    folder: Path,
    config: Config | None = None,
    shards: int = 1,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> Path:
    """A checkpoint folder: config.json, and files whose data is a hole."""
    config = make_config() if config is None else config
    tensors = tensors_of(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        write_header(folder / SINGLE, header_of(tensors))
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_header(folder / file, header_of(part))
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
