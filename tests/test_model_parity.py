"""The whole model in one process against transformers: float32, the same weights, no loader."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from make_checkpoint import gpt_oss_config, make_checkpoint
from paged import Pages
from parity import TOLERANCE, load_theirs
from safetensors.torch import load_file

from tpx.batch import FULL, SLIDING
from tpx.comm import Groups
from tpx.config import read_config
from tpx.families import family_of
from tpx.mesh import Mesh
from tpx.models import BUILDERS
from tpx.ops.kernel import REFERENCE
from tpx.plan.types import Cut, DispatchPlan, RankPlan

WINDOW = 6


def config(hidden, width, experts, top_k, heads, kv_heads, head_dim, vocab, **changes):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "sliding_window": WINDOW,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "rope_scaling": yarn | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return gpt_oss_config(**sizes | changes)


PLAIN_ROPE = {"rope_type": "default"}
FULL_FIRST = ["full_attention", "sliding_attention", "sliding_attention"]
ROUNDED = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
ROUNDED |= {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": True, "attention_factor": 1.5}
# name -> (config, how experts are stored, which form config.json has)
CASES = {
    "awkward": (config(96, 224, 5, 3, 8, 2, 32, 131), "mxfp4", "old"),
    "one key head": (config(64, 96, 3, 2, 4, 1, 8, 257), "mxfp4", "new"),
    "as many key heads": (config(128, 288, 16, 4, 8, 8, 16, 131), "mxfp4", "new"),
    "plain experts": (config(64, 160, 7, 4, 8, 4, 16, 257), "bf16", "old"),
    "tied": (config(64, 96, 4, 2, 4, 2, 16, 131, tie_word_embeddings=True), "mxfp4", "new"),
    "plain rope": (config(64, 96, 4, 2, 4, 2, 16, 131, rope_scaling=PLAIN_ROPE), "bf16", "new"),
    "full first": (
        config(64, 96, 4, 2, 4, 2, 16, 131, num_hidden_layers=3, layer_types=FULL_FIRST)
        | {"rope_scaling": ROUNDED, "swiglu_limit": 0.5, "rms_norm_eps": 1e-3},
        "mxfp4",
        "new",
    ),
}


class Pair(NamedTuple):
    """folder: the checkpoint; theirs: transformers' model, float32."""

    folder: Any
    theirs: Any


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            described, experts, form = CASES[name]
            folder = tmp_path_factory.mktemp("checkpoint")
            make_checkpoint(folder, described, seed=7, experts=experts, rope_form=form)
            made[name] = Pair(folder, load_theirs(folder))
        return made[name]

    return get


def alone(spec, layout) -> RankPlan:
    """One rank that holds everything."""
    cuts = {name: Cut(None, 0, dim.size) for name, dim in layout.dims.items()}
    experts = spec.num_local_experts
    local = DispatchPlan("local", "local")
    return RankPlan(0, Mesh(), spec, {}, cuts, local, (0,) * experts, tuple(range(experts)))


def load_ours(folder, dtype=torch.float32):
    """(spec, model): built without memory, then given the checkpoint's own tensors."""
    family = family_of(read_config(folder))
    spec = family.spec(read_config(folder))
    layout = family.layout(spec)
    groups = Groups.alone(torch.device("cpu"))
    with torch.device("meta"):
        model = BUILDERS[family.model_type](spec, alone(spec, layout), groups, dtype, REFERENCE)
    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == {
        name: parameter.shape for name, parameter in layout.parameters.items()
    }
    tensors = {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }
    tensors = {n: t if t.dtype == torch.uint8 else t.to(dtype) for n, t in tensors.items()}
    if spec.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.model.prepare()
    return spec, model


class Runner:
    """Our model and a cache for its sequences."""

    def __init__(self, folder, dtype=torch.float32, page=4):
        self.spec, self.model = load_ours(folder, dtype)
        kinds = [FULL if k == "full_attention" else SLIDING for k in self.spec.layer_types]
        sizes = self.spec.num_key_value_heads, self.spec.head_dim, WINDOW
        self.pages = Pages(kinds, *sizes, page, blocks=256, dtype=dtype)

    @torch.inference_mode()
    def step(self, tokens):
        """Logits [rows, V] of the tokens, a tensor a sequence."""
        batch = self.pages.step(tokens)
        logits = self.model(batch, self.pages.caches)
        assert logits.dtype == torch.float32
        return logits.split([len(new) for new in tokens])


def prompts(vocab, lengths=(1, 5, 23)):
    generator = torch.Generator().manual_seed(vocab)
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def logits_of(theirs, ids):
    return theirs(torch.tensor([ids]), use_cache=False).logits[0].float()


def error(ours, theirs):
    """The largest difference, as a share of the largest logit."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_prompts_in_one_flat_batch_give_transformers_logits(name, pairs):
    pair = pairs(name)
    runner = Runner(pair.folder)
    ids = prompts(runner.spec.vocab_size)
    for ours, prompt in zip(runner.step(ids), ids, strict=True):
        assert error(ours, logits_of(pair.theirs, prompt)) <= TOLERANCE


@pytest.mark.parametrize("name", ["awkward", "full first"])
def test_chunks_and_single_steps_give_the_logits_of_one_prefill(name, pairs):
    pair = pairs(name)
    runner = Runner(pair.folder, page=2)
    ids = prompts(runner.spec.vocab_size, (11, 23, 17))
    parts: list[list[torch.Tensor]] = [[], [], []]
    for start, stop in [(0, 2), (2, 10), *((n, n + 1) for n in range(10, 23))]:
        for b, ours in enumerate(runner.step([x[start:stop] for x in ids])):
            parts[b].append(ours)
    for b, prompt in enumerate(ids):
        assert error(torch.cat(parts[b]), logits_of(pair.theirs, prompt)) <= TOLERANCE


def test_greedy_tokens_equal_transformers_for_64_tokens(pairs):
    pair = pairs("as many key heads")
    runner = Runner(pair.folder)
    (prompt,) = prompts(runner.spec.vocab_size, (9,))
    ours = list(prompt)
    new = list(prompt)
    for _ in range(64):
        new = [int(runner.step([new])[0][-1].argmax())]
        ours += new
    theirs = logits_of(pair.theirs, ours[:-1]).argmax(-1)
    assert ours[len(prompt) :] == theirs[len(prompt) - 1 :].tolist()


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16_is(pairs):
    pair = pairs("awkward")
    runner = Runner(pair.folder, torch.bfloat16)
    rough = load_theirs(pair.folder, torch.bfloat16)
    ids = prompts(runner.spec.vocab_size, (23, 100, 120))
    exact = torch.cat([logits_of(pair.theirs, x) for x in ids])
    theirs = torch.cat([logits_of(rough, x) for x in ids])
    ours = torch.cat(runner.step(ids))
    # Of the middle token: rounding sends a few to other experts, in either.
    far, near = ((x - exact).square().mean(-1).sqrt().median() for x in (theirs, ours))
    assert 0 < near <= 1.1 * far


def test_only_the_wanted_rows_have_logits(pairs):
    runner = Runner(pairs("tied").folder)
    batch = runner.pages.step([[5, 6, 7], [8, 9]])
    with torch.inference_mode():
        every = runner.model(batch, runner.pages.caches)
        some = runner.model(batch._replace(logits_at=torch.tensor([4, 0])), runner.pages.caches)
        none = runner.model(batch._replace(logits_at=torch.tensor([]).long()), runner.pages.caches)
    torch.testing.assert_close(some, every[[4, 0]])
    assert none.shape == (0, 131)


def test_a_batch_without_tokens_runs(pairs):
    runner = Runner(pairs("tied").folder)
    assert [x.shape for x in runner.step([[]])] == [(0, 131)]


def test_tied_weights_are_one_tensor_and_no_weight_is_trained(pairs):
    _, model = load_ours(pairs("tied").folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not any(p.requires_grad for p in model.parameters())
    _, model = load_ours(pairs("awkward").folder)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not any(p.requires_grad for p in model.parameters())
