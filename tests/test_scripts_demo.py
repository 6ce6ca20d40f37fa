"""The demo checkpoint that ships, and the parts of the script that trained it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_files import checkpoint_specs, stored_config, write_tensors
from demo_model import DemoModel, Muon, mxfp4_of, orthogonal, straight_through
from demo_text import documents
from demo_tokens import END_ID, RETURN_ID, SPECIAL, byte_lengths, rendered, train_tokenizer
from make_checkpoint import demo_config, gpt_oss_config
from test_scripts_checkpoint import load, tensors_in
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer

from tpx.mxfp4 import dequantize, quantize

DEMO = Path(__file__).parent.parent / "examples" / "models" / "tpx-demo"
SIGNED = "<span>heapq.</span><span>heappush</span>(<em>heap</em>, <em>item</em>)"
SAID = "Push the value <em>item</em> onto the <code>heap</code>, maintaining the heap invariant."
PAGE = f"""<html><body><div class="sphinxsidebar">menu</div><div class="body" role="main">
<section id="m"><h1><code>heapq</code> \u2014 Heap queue<a class="headerlink">\xb6</a></h1>
<p>This module provides an implementation
of the <em>heap queue</em> algorithm.</p>
<dl class="py function"><dt class="sig sig-object py" id="heapq.heappush">
{SIGNED}<a class="headerlink">\xb6</a></dt>
<dd><p>{SAID}</p></dd></dl>
<section id="b"><h2>Basic Examples</h2><pre>&gt;&gt;&gt; h = []
&gt;&gt;&gt; heappush(h, 1)</pre>
<ul><li>{"A list item that is long enough. " * 8}</li></ul>
</section></section></div></body></html>"""


def test_it_is_at_most_16_mb_in_two_or_more_shards():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 16_000_000
    assert len(list(DEMO.glob("*.safetensors"))) >= 2


def test_it_is_stored_as_gpt_oss_is_published():
    config = json.loads((DEMO / "config.json").read_text())
    assert config == stored_config(demo_config())
    tensors = tensors_in(DEMO)
    specs = checkpoint_specs(config)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: s.shape for n, s in specs.items()}
    assert config["intermediate_size"] // 32 % 4 != 0
    for name, tensor in tensors.items():
        if name.endswith("_scales"):
            assert 100 < tensor.min() <= tensor.max() < 130, name
        elif not name.endswith("_blocks"):
            assert tensor.isfinite().all(), name


def test_its_tokenizer_returns_any_text_and_knows_where_to_stop():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == demo_config()["vocab_size"]
    for text in ("def f(x):\n    return x ** 2\n", "naïve 東京 🙂\r\n\t \n", "1234567.89"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.id_to_token(i) for i in range(len(SPECIAL))] == list(SPECIAL)
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [RETURN_ID, END_ID]


def test_its_chat_template_is_what_it_was_trained_on():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    message = {"role": "user", "content": "What is `re`?"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text == "<|start|>user<|message|>What is `re`?<|end|><|start|>assistant<|message|>"


def test_it_has_learnt_the_documentation():
    """Below 1.5 bits a byte on sentences in the documentation's manner, written for this test."""
    text = (
        "Return a copy of the string in which each character is converted to lowercase. "
        "If the optional argument *key* is given, it must be a function that takes one argument."
        "\n\nChanged in version 3.8: The *timeout* parameter was added."
    )
    ids = torch.tensor([Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids])
    with torch.no_grad():
        logits = load(DEMO, "mxfp4")[0](ids).logits
    bits = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item() / math.log(2)
    assert bits / len(text.encode()) < 1.5


def test_the_model_that_trains_is_the_model_that_transformers_loads(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "sliding_window": 8}
    counts = {"num_hidden_layers": 2, "num_local_experts": 5, "num_attention_heads": 4}
    counts |= {"num_key_value_heads": 2, "vocab_size": 131, "eos_token_id": 1, "pad_token_id": 0}
    config = gpt_oss_config(**sizes, **counts)
    model = DemoModel(config, 40).eval()
    for name, weight in model.named_parameters():
        if weight.ndim < 3 or "bias" in name or "router" in name:
            weight.data += 0.3 * torch.randn_like(weight)
            weight.data = weight.data.bfloat16().float()
        elif "proj_weight" in name:
            weight.data = weight.data.bfloat16().float()
    write_tensors(tmp_path, stored_config(config), model.checkpoint(), shards=2)
    ids = torch.randint(131, (2, 40))
    with torch.no_grad():
        packed = straight_through(model.gate_up_proj), straight_through(model.down_proj)
        ours, _ = model(ids, *packed)
        theirs = load(tmp_path, "mxfp4", attn_implementation="eager")[0](ids).logits
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_quantising_chooses_the_better_of_two_scales_and_passes_the_gradient():
    torch.manual_seed(0)
    weight = torch.randn(64, 256, requires_grad=True)
    kept = straight_through(weight)
    kept.backward(torch.full_like(kept, 3.0))
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))
    packed = mxfp4_of(weight.detach())
    assert torch.equal(dequantize(packed, torch.float32), kept.detach())
    errors = [
        (dequantize(p, torch.float32) - weight.detach()).square().unflatten(-1, (-1, 32)).sum(-1)
        for p in (packed, quantize(weight.detach()))
    ]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.97 * errors[1].sum()


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    stack = torch.randn(3, 48, 32)
    sizes = torch.linalg.svdvals(orthogonal(stack))
    assert 0.5 < sizes.min() <= sizes.max() < 1.4
    weight = torch.nn.Parameter(stack.clone())
    weight.grad = torch.randn_like(stack)
    Muon([weight], lr=0.01, decay=0.0).step()
    rms = (weight.detach() - stack).square().mean().sqrt().item()
    assert rms == pytest.approx(0.01 * 0.2, rel=0.3)


def test_a_sphinx_page_becomes_markdown_and_questions(tmp_path):
    (tmp_path / "heapq.html").write_text(PAGE)
    pages = [one for one in documents(tmp_path, chat=True) if one.kind == "page"]
    title = "# heapq \u2014 Heap queue"
    assert [one.text.splitlines()[:3] for one in pages][-1] == [title, "", "## Basic Examples"]
    assert "```\n>>> h = []\n>>> heappush(h, 1)\n```\n\n* A list item" in pages[-1].text
    (chat,) = (one for one in documents(tmp_path, chat=True) if one.kind == "chat")
    assert "`heapq.heappush()`" in chat.question
    said = "Push the value *item* onto the `heap`, maintaining the heap invariant."
    assert chat.text == f"`heapq.heappush(heap, item)`\n\n{said}"
    assert rendered(chat).endswith("invariant.<|return|>")


def test_byte_lengths_add_up_to_the_text():
    text = "Each byte of “this” counts: naïve, 東京.\n" * 20
    tokenizer = train_tokenizer([text], vocab=300)
    ids = tokenizer.encode(text + "<|endoftext|>").ids
    assert byte_lengths(tokenizer)[ids].sum() == len(text.encode())
