"""The checkpoint writers: what they write is what Hugging Face stores, to the name and the byte."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    checkpoint_specs,
    cut_into_shards,
    lay_out,
    stored_config,
    write_tensors,
)
from make_checkpoint import SIZES, gpt_oss_config, make_checkpoint, write_headers
from safetensors import safe_open
from transformers import GptOssForCausalLM, Mxfp4Config

DATA = Path(__file__).parent / "data"
SCRIPT = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"
TINY = gpt_oss_config(
    vocab_size=131,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_local_experts=5,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=8,
    max_position_embeddings=64,
    eos_token_id=2,
    pad_token_id=0,
)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            assert not names & tensors.keys()
            tensors |= {name: file.get_tensor(name) for name in names}
    return tensors


def load(folder: Path, experts: str, **options: Any) -> tuple[GptOssForCausalLM, dict[str, Any]]:
    if experts == "mxfp4":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    return GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_files_hold_the_tensors_that_config_promises(tmp_path, experts, shards):
    folder = make_checkpoint(tmp_path, TINY, shards=shards, experts=experts)
    assert len(list(folder.glob("*.safetensors"))) == shards
    specs = checkpoint_specs(TINY, experts)
    tensors = tensors_in(folder)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    words = {torch.bfloat16: "BF16", torch.uint8: "U8"}
    assert all(words[t.dtype] == specs[name].dtype for name, t in tensors.items())


def test_the_index_names_each_tensors_file_and_the_bytes_of_all(tmp_path):
    folder = make_checkpoint(tmp_path, TINY, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    specs = checkpoint_specs(TINY)
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in specs.values())
    assert index["weight_map"].keys() == specs.keys()
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as opened:
            assert name in set(opened.keys())


def test_a_seed_gives_the_same_values_in_any_number_of_shards(tmp_path):
    one = tensors_in(make_checkpoint(tmp_path / "1", TINY, seed=5, shards=1))
    four = tensors_in(make_checkpoint(tmp_path / "4", TINY, seed=5, shards=4))
    other = tensors_in(make_checkpoint(tmp_path / "other", TINY, seed=6))
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("form", ["old", "new"])
def test_transformers_loads_it_and_its_logits_are_neither_flat_nor_huge(tmp_path, experts, form):
    folder = make_checkpoint(tmp_path, TINY, experts=experts, rope_form=form)
    stored = json.loads((folder / "config.json").read_text())
    assert ("rope_parameters" in stored, "dtype" in stored) == (form == "new",) * 2
    assert ("quantization_config" in stored) == (experts == "mxfp4")
    model, info = load(folder, experts)
    assert not any(info.values()), info
    assert model.config.rope_parameters["rope_theta"] == 150000
    with torch.no_grad():
        logits = model(torch.arange(40)[None] % 131).logits
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2


@pytest.mark.parametrize(
    ("size", "shards", "tensors", "nbytes"),
    [("20b", 3, 459, 13_761_264_768), ("120b", 15, 687, 65_248_815_744)],
)
def test_the_published_sizes_are_exact(size, shards, tensors, nbytes):
    stored = json.loads(gzip.decompress((DATA / f"gpt-oss-{size}.json.gz").read_bytes()))
    headers = [dict(file["header"]) for file in stored["files"]]
    assert [header.pop("__metadata__") for header in headers] == [{"format": "pt"}] * shards
    assert sum(map(len, headers)) == tensors
    assert sum(max(t["data_offsets"][1] for t in header.values()) for header in headers) == nbytes
    assert stored["files"][0]["name"] == f"model-00000-of-{shards - 1:05}.safetensors"
    assert stored["config"]["num_local_experts"] == {"20b": 32, "120b": 128}[size]


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_headers_only_writes_what_is_under_tests_data(tmp_path, size):
    command = [sys.executable, str(SCRIPT), "--size", size, "--headers-only"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    name = f"gpt-oss-{size}.json.gz"
    written, kept = (gzip.decompress((f / name).read_bytes()) for f in (tmp_path, DATA))
    assert written == kept


def test_lay_out_gives_full_size_files_with_real_headers_and_no_data_on_disk(tmp_path):
    json_gz = DATA / "gpt-oss-20b.json.gz"
    folder = lay_out(json_gz, tmp_path / "20b")
    stored = json.loads(gzip.decompress(json_gz.read_bytes()))
    assert json.loads((folder / "config.json").read_text()) == stored["config"]
    for file in stored["files"]:
        path = folder / file["name"]
        assert path.stat().st_size == file["size"]
        assert path.stat().st_blocks * 512 < 1 << 20
        with safe_open(path, "pt") as opened:  # refuses a header that disagrees with the size
            assert set(opened.keys()) == file["header"].keys() - {"__metadata__"}


def test_laid_out_headers_are_those_of_the_checkpoint_written_whole(tmp_path):
    whole = make_checkpoint(tmp_path / "whole", TINY, shards=2)
    write_headers(tmp_path / "tiny.json.gz", TINY, shards=2)
    holes = lay_out(tmp_path / "tiny.json.gz", tmp_path / "holes")
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in holes.iterdir())
    sizes = [[(f / name).stat().st_size for name in names] for f in (whole, holes)]
    assert sizes[0] == sizes[1]
    first = (whole / "model-00000-of-00001.safetensors").read_bytes()
    length = 8 + int.from_bytes(first[:8], "little")
    assert (holes / "model-00000-of-00001.safetensors").read_bytes()[:length] == first[:length]


def test_tensors_that_config_does_not_promise_are_not_written(tmp_path):
    tensors = tensors_in(make_checkpoint(tmp_path / "a", TINY))
    config = stored_config(TINY)
    write_tensors(tmp_path / "b", config, tensors, shards=2)
    assert all(torch.equal(t, tensors[name]) for name, t in tensors_in(tmp_path / "b").items())
    short = tensors | {"lm_head.weight": tensors["lm_head.weight"][1:]}
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        write_tensors(tmp_path / "c", config, short, shards=2)
    tensors.pop("model.norm.weight")
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        write_tensors(tmp_path / "d", config, tensors, shards=2)


@pytest.mark.parametrize("shards", [1, 2, 7, 15])
def test_shards_are_consecutive_near_equal_and_never_empty(shards):
    specs = checkpoint_specs(SIZES["20b"].config)
    parts = cut_into_shards(specs, shards)
    assert len(parts) == shards
    place = {name: number for number, name in enumerate(specs)}
    runs = [sorted(place[name] for name in part) for part in parts]
    assert [number for run in runs for number in run] == list(range(len(specs)))
    sizes = [sum(spec.nbytes for spec in part.values()) for part in parts]
    largest = max(spec.nbytes for spec in specs.values())
    assert max(sizes) - min(sizes) <= 2 * largest
    assert len(cut_into_shards(dict(list(specs.items())[:5]), 5)) == 5
