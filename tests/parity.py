"""What the parity tests share: configs with awkward sizes, and what transformers answers.

The reference is transformers' GptOssForCausalLM in float32 with eager attention, MXFP4 dequantised.
"""

from __future__ import annotations

import functools
import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from make_checkpoint import gpt_oss_config, make_checkpoint

import tpx
from tpx.config import read_config
from tpx.mesh import Mesh

TOLERANCE = 2e-5  # of the largest logit
GREEDY = 64
DEMO = Path(__file__).parent.parent / "examples" / "models" / "tpx-demo"


class Answer(NamedTuple):
    """logits: [tokens, vocab] float32 a prompt. tokens: the greedy continuation a prompt."""

    logits: list[np.ndarray]
    tokens: list[list[int]]


def config(
    hidden: int,
    blocks: int,
    experts: int,
    top_k: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    window: int = 8,
    layers: int = 2,
) -> dict[str, Any]:
    yarn = gpt_oss_config()["rope_scaling"] | {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return gpt_oss_config(
        hidden_size=hidden,
        intermediate_size=32 * blocks,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        experts_per_token=top_k,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        sliding_window=window,
        num_hidden_layers=layers,
        max_position_embeddings=256,
        initial_context_length=64,
        rope_scaling=yarn,
        rope_theta=10000.0,
        eos_token_id=1,
        pad_token_id=0,
    )


# name -> (config, how its experts are stored, which form config.json has)
CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "3-blocks": (config(64, 3, 8, 2, heads=8, kv_heads=4, head_dim=16, vocab=131), "mxfp4", "old"),
    "7-blocks": (config(96, 7, 4, 3, heads=4, kv_heads=1, head_dim=32, vocab=257), "mxfp4", "new"),
    "5-blocks": (config(128, 5, 16, 4, heads=8, kv_heads=2, head_dim=8, vocab=131), "mxfp4", "old"),
    "plain": (config(64, 9, 12, 4, heads=8, kv_heads=8, head_dim=16, vocab=257), "bf16", "new"),
    "3-experts": (config(64, 3, 3, 2, heads=4, kv_heads=2, head_dim=8, vocab=257), "mxfp4", "old"),
}


def drawn_config(seed: int) -> tuple[dict[str, Any], str, str]:
    """A config as in CONFIGS, of sizes drawn from the awkward ones."""
    draw = random.Random(seed)
    experts = draw.randint(3, 16)
    kv_heads = draw.choice([1, 2, 4, 8])
    described = config(
        draw.choice([64, 96, 128]),
        draw.choice([3, 5, 7, 9]),
        experts,
        min(experts, draw.choice([2, 3, 4])),
        heads=kv_heads * draw.choice([1, 2, 4]),
        kv_heads=kv_heads,
        head_dim=draw.choice([8, 16, 32]),
        vocab=draw.choice([131, 257]),
        window=draw.choice([4, 8, 16]),
        layers=draw.choice([2, 3]),
    )
    return described, draw.choice(["mxfp4", "bf16"]), draw.choice(["old", "new"])


def fits(described: dict[str, Any], mesh: Mesh) -> bool:
    """Whether a shipped plan of this mesh can cut the model."""
    heads, kv_heads = described["num_attention_heads"], described["num_key_value_heads"]
    cut = heads % mesh.tp == 0 and (kv_heads % mesh.tp == 0 or mesh.tp % kv_heads == 0)
    return cut and described["num_local_experts"] % mesh.ep == 0


def build(folder: Path, name: str, seed: int = 0) -> Path:
    """Writes the checkpoint of one of CONFIGS."""
    return write(folder, CONFIGS[name], seed)


def write(folder: Path, described: tuple[dict[str, Any], str, str], seed: int = 0) -> Path:
    config, experts, form = described
    return make_checkpoint(folder, config, seed=seed, shards=2, experts=experts, rope_form=form)


def prompts(vocab: int, lengths: tuple[int, ...] = (1, 5, 21)) -> list[list[int]]:
    """Prompts of one token, shorter and longer than the window of 8."""
    generator = np.random.default_rng(vocab)
    return [generator.integers(2, vocab, size=length).tolist() for length in lengths]


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with its experts dequantised."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    packed = "quantization_config" in read_config(folder)
    quantization = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own kernels
        return GptOssForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", **quantization
        ).eval()


@functools.cache
def reference(folder: Path, greedy: int = GREEDY) -> Answer:
    """What transformers answers to `prompts`, greedy tokens computed one forward a token."""
    model = load_theirs(folder)
    answers = [_continue(model, ids, greedy) for ids in prompts(model.config.vocab_size)]
    return Answer([logits for logits, _ in answers], [tokens for _, tokens in answers])


@torch.inference_mode()
def _continue(model: Any, ids: list[int], count: int) -> tuple[np.ndarray, list[int]]:
    out = model(torch.tensor([ids]), use_cache=True)
    logits, tokens = out.logits[0].float().numpy(), []
    while True:
        tokens.append(int(out.logits[0, -1].argmax()))
        if len(tokens) == count:
            return logits, tokens
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)


def answer(folder: str, plan: str, vocab: int, greedy: int = GREEDY) -> Answer:
    """What tpx answers: run on every rank."""
    params = tpx.SamplingParams(max_tokens=greedy, ignore_eos=True)
    with tpx.LLM(folder, tp_plan=plan, dtype="float32", device="cpu") as llm:
        logits = [row.numpy() for row in llm.logits(prompts(vocab))]
        return Answer(logits, [list(c.token_ids) for c in llm.generate(prompts(vocab), params)])


def one_prompt(folder: str, plan: str, ids: list[int]) -> np.ndarray:
    """The logits of a single prompt: fewer prompts than dp groups."""
    with tpx.LLM(folder, tp_plan=plan, dtype="float32", device="cpu") as llm:
        return llm.logits([ids])[0].numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit."""
    assert ours.shape == theirs.shape, f"{ours.shape=} {theirs.shape=}"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(ours: Answer, theirs: Answer) -> None:
    for mine, logits in zip(ours.logits, theirs.logits, strict=True):
        assert relative_error(mine, logits) <= TOLERANCE
    assert ours.tokens == [tokens[: len(ours.tokens[0])] for tokens in theirs.tokens]
