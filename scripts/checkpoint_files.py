"""The files of a gpt-oss checkpoint as Hugging Face stores one: names, shapes, shards, configs.

Writes and lays out safetensors files by hand, so that a checkpoint of any size needs no memory.
Knows nothing of where the values come from, and nothing of tpx.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

BLOCK = 32  # values that share one scale in MXFP4
ITEM_BYTES = {"BF16": 2, "U8": 1}
TORCH_DTYPE = {"BF16": torch.bfloat16, "U8": torch.uint8}
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router"]
NOT_CONVERTED += ["model.embed_tokens", "lm_head"]
Config = dict[str, Any]


class Spec(NamedTuple):
    """A tensor of a checkpoint: safetensors' word for its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


def attention_specs(config: Config) -> dict[str, Spec]:
    """Names under `model.layers.N.self_attn.` -> Spec."""
    hidden, head = config["hidden_size"], config.get("head_dim", 64)
    query = config["num_attention_heads"] * head
    key = config["num_key_value_heads"] * head
    rows = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}
    rows["o_proj"] = (hidden, query)
    specs = {f"{name}.weight": Spec("BF16", shape) for name, shape in rows.items()}
    if config.get("attention_bias", True):
        specs |= {f"{name}.bias": Spec("BF16", shape[:1]) for name, shape in rows.items()}
    return specs | {"sinks": Spec("BF16", (config["num_attention_heads"],))}


def packed(experts: int, rows: int, columns: int) -> dict[str, Spec]:
    assert columns % BLOCK == 0, f"{columns=} is not whole MXFP4 blocks of {BLOCK}"
    blocks = columns // BLOCK
    return {
        "_blocks": Spec("U8", (experts, rows, blocks, BLOCK // 2)),
        "_scales": Spec("U8", (experts, rows, blocks)),
    }


def mlp_specs(config: Config, experts: str) -> dict[str, Spec]:
    """Names under `model.layers.N.mlp.` -> Spec; experts: "mxfp4" (rows first), "bf16" (last)."""
    assert experts in ("mxfp4", "bf16"), f"{experts=}"
    hidden, width = config["hidden_size"], config["intermediate_size"]
    count = config["num_local_experts"]
    specs = {"router.weight": Spec("BF16", (count, hidden)), "router.bias": Spec("BF16", (count,))}
    for name, rows, columns in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
        key = f"experts.{name}_proj"
        specs[f"{key}_bias"] = Spec("BF16", (count, rows))
        if experts == "bf16":
            specs[key] = Spec("BF16", (count, columns, rows))
        else:
            specs |= {key + end: spec for end, spec in packed(count, rows, columns).items()}
    return specs


def checkpoint_specs(config: Config, experts: str = "mxfp4") -> dict[str, Spec]:
    """Every tensor of GptOssForCausalLM as published: name -> Spec, in the model's order."""
    hidden, table = config["hidden_size"], (config["vocab_size"], config["hidden_size"])
    specs = {"model.embed_tokens.weight": Spec("BF16", table)}
    attention, mlp = attention_specs(config), mlp_specs(config, experts)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        specs[f"{prefix}.input_layernorm.weight"] = Spec("BF16", (hidden,))
        specs |= {f"{prefix}.self_attn.{name}": spec for name, spec in attention.items()}
        specs[f"{prefix}.post_attention_layernorm.weight"] = Spec("BF16", (hidden,))
        specs |= {f"{prefix}.mlp.{name}": spec for name, spec in mlp.items()}
    specs["model.norm.weight"] = Spec("BF16", (hidden,))
    if not config.get("tie_word_embeddings", False):
        specs["lm_head.weight"] = Spec("BF16", table)
    return specs


def stored_config(config: Config, experts: str = "mxfp4", rope_form: str | None = None) -> Config:
    """config as config.json holds it: quantization_config as the experts are, rope in one form.

    rope_form: "old" (rope_scaling + rope_theta + torch_dtype, as OpenAI published), "new"
    (rope_parameters + dtype, as transformers 5 writes), None leaves it as it is.
    """
    stored = dict(config)
    stored.pop("quantization_config", None)
    if experts == "mxfp4":
        stored["quantization_config"] = {
            "modules_to_not_convert": NOT_CONVERTED,
            "quant_method": "mxfp4",
        }
    if rope_form == "new" and "rope_scaling" in stored:
        rope = stored.pop("rope_scaling") | {"rope_theta": stored.pop("rope_theta")}
        stored |= {"rope_parameters": rope, "dtype": stored.pop("torch_dtype")}
    if rope_form == "old" and "rope_parameters" in stored:
        rope = dict(stored.pop("rope_parameters"))
        stored |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        stored["torch_dtype"] = stored.pop("dtype")
    return stored


def cut_into_shards(specs: Mapping[str, Spec], shards: int) -> list[dict[str, Spec]]:
    """Consecutive runs of about equal bytes, each with at least one tensor.

    Inside a shard wider types come first, then names in order, as safetensors itself writes them:
    so every tensor is aligned to its type.
    """
    assert 1 <= shards <= len(specs), f"{shards=} of {len(specs)} tensors"
    total = sum(spec.nbytes for spec in specs.values())
    cut: list[dict[str, Spec]] = [{}]
    done = 0
    for place, (name, spec) in enumerate(specs.items()):
        full = done >= total * len(cut) / shards or len(specs) - place <= shards - len(cut)
        if cut[-1] and full and len(cut) < shards:
            cut.append({})
        cut[-1][name] = spec
        done += spec.nbytes
    return [dict(sorted(part.items(), key=file_order)) for part in cut]


def file_order(item: tuple[str, Spec]) -> tuple[int, str]:
    return -ITEM_BYTES[item[1].dtype], item[0]


def shard_name(number: int, shards: int) -> str:
    """As gpt-oss is published: both numbers count from 0. A single file has no number."""
    if shards == 1:
        return "model.safetensors"
    return f"model-{number:05}-of-{shards - 1:05}.safetensors"


def header_of(specs: Mapping[str, Spec]) -> dict[str, Any]:
    """The safetensors header of a file that holds these tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        offsets = [offset, offset + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.nbytes
    return header


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Eight bytes of length, then JSON padded with spaces: the data starts at a multiple of 8."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def data_bytes(header: Mapping[str, Any]) -> int:
    return max(t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_index(folder: Path, headers: Mapping[str, Mapping[str, Any]]) -> None:
    """model.safetensors.index.json for files {name: header}; one file needs none."""
    if len(headers) == 1:
        return
    names = {t: file for file, header in headers.items() for t in header if t != "__metadata__"}
    total = sum(data_bytes(header) for header in headers.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_configs(folder: Path, config: Config) -> None:
    """config.json, and generation_config.json with the ids that config has."""
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("eos_token_id", "pad_token_id") if key in config}
    write_json(folder / "generation_config.json", {"do_sample": True, **ids})


Fill = Callable[[Path, int, Mapping[str, Spec]], None]


def write_checkpoint(
    folder: Path, config: Config, specs: dict[str, Spec], shards: int, fill: Fill
) -> None:
    """Every file; fill(path, start, specs) writes the data of one shard from byte start."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = {}
    for number, part in enumerate(cut_into_shards(specs, shards)):
        path = folder / shard_name(number, shards)
        headers[path.name] = header = header_of(part)
        head = header_bytes(header)
        path.write_bytes(head)
        fill(path, len(head), part)
    write_index(folder, headers)
    write_configs(folder, config)


def write_tensors(
    folder: Path, config: Config, tensors: dict[str, torch.Tensor], shards: int
) -> None:
    """A checkpoint from tensors in memory, which must be those that config promises."""
    experts = "mxfp4" if "quantization_config" in config else "bf16"
    specs = checkpoint_specs(config, experts)
    assert specs.keys() == tensors.keys(), sorted(specs.keys() ^ tensors.keys())

    def fill(path: Path, start: int, part: Mapping[str, Spec]) -> None:
        with path.open("ab") as out:
            for name, spec in part.items():
                tensor = tensors[name].contiguous()
                assert tuple(tensor.shape) == spec.shape, f"{name}: {tuple(tensor.shape)}, {spec}"
                assert tensor.dtype == TORCH_DTYPE[spec.dtype], f"{name}: {tensor.dtype}, {spec}"
                out.write(tensor.view(torch.uint8).numpy().data)

    write_checkpoint(folder, config, specs, shards, fill)


def headers_json(path: Path, config: Config, specs: dict[str, Spec], shards: int) -> None:
    """config.json and every file's name, size and header, as one compressed JSON."""
    files = []
    for number, part in enumerate(cut_into_shards(specs, shards)):
        header = header_of(part)
        size = len(header_bytes(header)) + data_bytes(header)
        files.append({"name": shard_name(number, shards), "size": size, "header": header})
    text = json.dumps({"config": config, "files": files}, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(text, 9, mtime=0))


def lay_out(json_gz: Path | str, folder: Path | str) -> Path:
    """The checkpoint of headers_json in full size: real headers, holes for data; -> folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = json.loads(gzip.decompress(Path(json_gz).read_bytes()))
    for file in stored["files"]:
        with (folder / file["name"]).open("wb") as out:
            out.write(header_bytes(file["header"]))
            out.truncate(file["size"])
    write_index(folder, {file["name"]: file["header"] for file in stored["files"]})
    write_configs(folder, stored["config"])
    return folder
