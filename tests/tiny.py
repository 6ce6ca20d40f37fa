"""A checkpoint of random weights that runs in milliseconds, with a tokenizer of its own.

Imported in ranks: nothing slow here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from make_checkpoint import gpt_oss_config, make_checkpoint
from tokenizers import decoders, models, pre_tokenizers

import tpx
from tpx import SamplingParams
from tpx.engine.blocks import Blocks, Pages
from tpx.engine.cache import make_caches
from tpx.engine.engine import Engine
from tpx.engine.runner import Runner
from tpx.engine.scheduler import Limits
from tpx.session import Session
from tpx.text import Tokenizer

# 3 blocks inside an expert, so that one of four ranks holds none; a window shorter than prompts.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 263,
    "sliding_window": 20,
    "max_position_embeddings": 96,
    "eos_token_id": 262,
}
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "n"), ("en", "d"), ("Ã", "©")]


# Prompts of all lengths, and ways to continue them that end for every reason.
PROMPTS = [[7], "the end", list(range(40)), "é", [3, 1, 4, 1, 5, 9, 2, 6]]
PARAMS = [
    SamplingParams(max_tokens=12),
    SamplingParams(temperature=1.0, seed=1, max_tokens=14),
    SamplingParams(temperature=0.8, top_k=20, seed=2, max_tokens=9),
    SamplingParams(temperature=1.5, top_p=0.9, seed=3, max_tokens=18, ignore_eos=True),
    SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=2**64 - 1, max_tokens=40),
]


def tiny_config(**changes: Any) -> dict[str, Any]:
    return gpt_oss_config(**SIZES | changes)


def tiny_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """With a tokenizer: 256 bytes, six merges and <end>, 263 ids in all."""
    make_checkpoint(folder, tiny_config(**changes), seed)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level BPE: every byte is a token, and a few are merged; <end> is a special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(left + right for left, right in MERGES)]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, MERGES)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def open_llm(folder: Path, plan: str, **options: Any) -> tpx.LLM:
    return tpx.LLM(folder, plan, dtype="float32", device="cpu", **options)


def fix_shapes(llm: tpx.LLM) -> None:
    """Steps of one token each run in the shapes that a GPU captures."""
    engine = llm.session.engine
    engine.runner = Runner(engine.runner.model, engine.runner.caches, llm.groups, llm.device, True)


def give_pages(llm: tpx.LLM, full: int, sliding: int, tokens: int = 512) -> None:
    """Another cache, of so many pages, and a step of so many tokens."""
    old = llm.session.engine
    caches = make_caches(Pages(full, sliding), llm._cache, llm.device)
    runner = Runner(old.runner.model, caches, llm.groups, llm.device, False)
    blocks = Blocks(full, sliding, llm.spec.sliding_window, old.blocks.shares)
    llm.session = Session(
        Engine(runner, blocks, Limits(tokens, min(64, tokens)), llm.groups), llm.groups
    )


def changed(folder: Path, target: Path, name: str, **values: Any) -> Path:
    """A copy of the checkpoint with other values in one of its JSON files; None removes the key."""
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    found = json.loads((target / name).read_text()) | values
    found = {key: value for key, value in found.items() if value is not None}
    (target / name).write_text(json.dumps(found))
    return target
