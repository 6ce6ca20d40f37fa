"""Writes a gpt-oss checkpoint of random weights at any size, or only its headers.

    python scripts/make_checkpoint.py --size 20b --out /tmp/gpt-oss-20b
    python scripts/make_checkpoint.py --size 120b --headers-only --out tests/data

The values are drawn at scales that keep activations near 1, so logits are finite and not flat.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from checkpoint_files import (
    BLOCK,
    Config,
    Spec,
    checkpoint_specs,
    headers_json,
    lay_out,
    stored_config,
    write_checkpoint,
)

__all__ = ["SIZES", "gpt_oss_config", "lay_out", "make_checkpoint", "write_headers"]

CHUNK = 1 << 22  # bytes drawn, and written, at a time by one thread
E2M1_RMS = math.sqrt(
    (0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8
)  # of the eight magnitudes, each as likely


def gpt_oss_config(**changes: Any) -> Config:
    """gpt-oss-20b's config.json in the published form, without quantization_config; changes win.

    layer_types follows num_hidden_layers, sliding first, unless it is given.
    """
    config = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 201088,
    } | changes
    kinds = ["sliding_attention", "full_attention"] * config["num_hidden_layers"]
    config.setdefault("layer_types", kinds[: config["num_hidden_layers"]])
    return config


def demo_config() -> Config:
    """The sizes of the shipped demo checkpoint, which train_demo.py trains."""
    return gpt_oss_config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=224,
        num_hidden_layers=6,
        num_local_experts=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        sliding_window=64,
        max_position_embeddings=512,
        initial_context_length=128,
        rope_scaling=gpt_oss_config()["rope_scaling"]
        | {"factor": 4.0, "original_max_position_embeddings": 128},
        eos_token_id=1,
        pad_token_id=0,
    )


class Size(NamedTuple):
    config: Config
    shards: int


SIZES = {
    "20b": Size(gpt_oss_config(), 3),
    "120b": Size(gpt_oss_config(num_hidden_layers=36, num_local_experts=128), 15),
    "demo": Size(demo_config(), 2),
}


def std_of(name: str, spec: Spec) -> float:
    """Standard deviation of a bf16 tensor's values: 1/sqrt(fan in) for a matrix."""
    if name.endswith(("bias", "norm.weight")):
        return 0.1
    if name.endswith(("sinks", "embed_tokens.weight")):
        return 1.0
    fan_in = spec.shape[-2] if name.endswith(("gate_up_proj", "down_proj")) else spec.shape[-1]
    return 1 / math.sqrt(fan_in)


@functools.cache
def normal_table(mean: float, std: float) -> np.ndarray:
    """65536 equally likely values of a normal distribution, as bf16 bits: a draw is a look-up."""
    quantiles = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    values = mean + std * torch.special.ndtri(quantiles)
    return values.to(torch.bfloat16).view(torch.uint16).numpy()


def draw(table: np.ndarray | None, nbytes: int, seeds: tuple[int, ...]) -> np.ndarray:
    """nbytes random bytes, or as many bytes of bf16 from table; the same for the same seeds."""
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seeds)))
    words = generator.integers(0, 1 << 64, size=-(-nbytes // 8), dtype=np.uint64)
    if table is None:
        return words.view(np.uint8)[:nbytes]
    return table[words.view(np.uint16)[: nbytes // 2]].view(np.uint8)


def scale_table(columns: int) -> np.ndarray:
    """E8M0 bytes in three steps, around the one that makes a row's values 1/sqrt(columns)."""
    middle = 127 + round(math.log2(1 / (E2M1_RMS * math.sqrt(columns))))
    return (middle + np.arange(256) % 3 - 1).astype(np.uint8)


def values(name: str, spec: Spec, nbytes: int, seeds: tuple[int, ...]) -> np.ndarray:
    """nbytes of the tensor's data: nibbles and scale bytes of MXFP4, or bf16."""
    if name.endswith("_blocks"):
        return draw(None, nbytes, seeds)
    if name.endswith("_scales"):
        return scale_table(spec.shape[-1] * BLOCK)[draw(None, nbytes, seeds)]
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    return draw(normal_table(mean, std_of(name, spec)), nbytes, seeds)


class Chunk(NamedTuple):
    name: str
    spec: Spec
    at: int  # byte of the file
    nbytes: int
    seeds: tuple[int, ...]


def chunks(specs: Mapping[str, Spec], start: int, seed: int) -> Iterator[Chunk]:
    """What to write where. Seeds follow the name: neither shards nor threads change a value."""
    for name, spec in specs.items():
        name_seed = int.from_bytes(name.encode(), "little")
        for number, at in enumerate(range(0, spec.nbytes, CHUNK)):
            nbytes = min(CHUNK, spec.nbytes - at)
            yield Chunk(name, spec, start + at, nbytes, (seed, name_seed, number))
        start += spec.nbytes


def fill_random(path: Path, start: int, specs: Mapping[str, Spec], seed: int) -> None:
    """Draws and writes a file's tensors in parallel; numpy and pwrite run outside the GIL."""
    with path.open("r+b") as out, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def write(chunk: Chunk) -> None:
            data = values(chunk.name, chunk.spec, chunk.nbytes, chunk.seeds)
            os.pwrite(out.fileno(), data, chunk.at)

        list(pool.map(write, chunks(specs, start, seed)))


def make_checkpoint(
    folder: Path | str,
    config: Config,
    seed: int = 0,
    shards: int = 2,
    experts: str = "mxfp4",
    rope_form: str | None = None,
) -> Path:
    """A checkpoint of random weights for config (in Hugging Face's form); -> folder.

    experts: "mxfp4" or "bf16". rope_form: "old", "new" or None, see stored_config.
    """
    stored = stored_config(config, experts, rope_form)
    specs = checkpoint_specs(stored, experts)
    write_checkpoint(
        Path(folder), stored, specs, shards, lambda *file: fill_random(*file, seed=seed)
    )
    return Path(folder)


def write_headers(path: Path, config: Config, shards: int, experts: str = "mxfp4") -> None:
    stored = stored_config(config, experts)
    headers_json(path, stored, checkpoint_specs(stored, experts), shards)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a gpt-oss checkpoint of random weights")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--size", choices=SIZES)
    what.add_argument("--config", type=Path, help="a config.json in Hugging Face's form")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, help="files (default: as published, else 2)")
    parser.add_argument("--experts", choices=("mxfp4", "bf16"), default="mxfp4")
    parser.add_argument("--rope-form", choices=("old", "new"), help="default: as the config has it")
    parser.add_argument(
        "--headers-only", action="store_true", help="write OUT/gpt-oss-SIZE.json.gz"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    config, shards = SIZES[args.size] if args.size else (json.loads(args.config.read_text()), 2)
    shards = args.shards or shards
    if args.headers_only:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"gpt-oss-{args.size or args.config.parent.name}.json.gz"
        write_headers(
            path, stored_config(config, args.experts, args.rope_form), shards, args.experts
        )
        print(f"{path}: {path.stat().st_size:,} bytes")
        return
    start = time.perf_counter()
    make_checkpoint(args.out, config, args.seed, shards, args.experts, args.rope_form)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {size / 1e9:.3f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
