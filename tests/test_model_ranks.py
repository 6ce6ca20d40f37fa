"""The model on real ranks against one rank: logits, the gradient of its input, its collectives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from make_checkpoint import make_checkpoint
from paged import Pages
from parity import config
from ranks import ranks

from tpx.batch import FULL, SLIDING
from tpx.comm import Groups
from tpx.models.load import load_model
from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan
from tpx.plan.prepare import prepare

WINDOW = 8
DESCRIBED = config(64, 3, 8, 2, heads=8, kv_heads=2, head_dim=8, vocab=131, window=WINDOW)
# Sequences of each dp group: more than the window, one token; then a group that has none.
PROMPTS = ([[11, 5, 9, 120, 7, 3, 2, 64, 65, 66, 67, 130], [4]], [])
STEPS = ([[17], [18]], [])


class Seen(NamedTuple):
    """Of a prefill and a decode step: logits, gradients of what was added to the embeddings, and
    (name, op, group) of every collective of the two forwards."""

    logits: list[torch.Tensor]
    grads: list[torch.Tensor]
    sent: list[list[tuple[str, str, str]]]


def observe(folder: str, plan: str, world: int, data: int | None = None) -> Seen:
    """Runs on every rank. data: whose sequences, where not those of the rank's dp group."""
    prepared = prepare(folder, plan, world)
    rank = torch.distributed.get_rank() if world > 1 else 0
    mesh, cpu = prepared.plan.mesh, torch.device("cpu")
    groups = Groups(mesh, rank, cpu) if world > 1 else Groups.alone(cpu)
    rank_plan = prepared.rank_plan(rank)
    model, _ = load_model(prepared, rank_plan, groups, torch.float64, cpu)
    kinds = [FULL if k == "full_attention" else SLIDING for k in prepared.spec.layer_types]
    kv_heads, width = rank_plan.cuts["KV"].size, prepared.spec.head_dim
    pages = Pages(kinds, kv_heads, width, WINDOW, dtype=torch.float64)
    seen = Seen([], [], [])
    for tokens in (PROMPTS, STEPS):
        mine = tokens[mesh.coords(rank).dp if data is None else data]
        longest = max(sum(map(len, sequences)) for sequences in tokens)
        batch = pages.step(mine)._replace(longest=longest, decode=tokens is STEPS)
        forward_and_backward(model, batch, pages, groups, seen)
    groups.close()
    return seen


def forward_and_backward(model, batch, pages, groups, seen: Seen) -> None:
    """As adapters would: adds a tensor that has a gradient to the embeddings."""
    delta = torch.zeros(len(batch.ids_T), DESCRIBED["hidden_size"], dtype=torch.float64)
    delta.requires_grad_()
    hook = model.model.embed_tokens.register_forward_hook(lambda *call: call[-1] + delta)
    with groups.recording() as records:
        logits = model(batch, pages.caches)
    hook.remove()
    slope = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * slope).sum().backward()
    pages.caches = [type(cache)(*(x.detach() for x in cache)) for cache in pages.caches]
    seen.logits.append(logits.detach())
    seen.grads.append(delta.grad)
    seen.sent.append([(r.name, r.op, r.group) for r in records])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), DESCRIBED, seed=3))


@pytest.fixture(scope="module")
def expected(folder):
    """One rank that runs each dp group's sequences."""
    return [observe(folder, "tp1", 1, data) for data in (0, 1)]


PLANS = ["tp2", "ep2", "tp2-ep2", "tp2-etp2", "dp2-ep2"]
PLANS += ["tp4-ep4", "tp4-etp4", "tp4-ep2-etp2", "dp2-tp2-ep4", "dp2-tp2-ep2-etp2"]
PLANS += ["dp2-tp2-edp2-ep2"]


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_give_the_logits_and_gradients_of_one_rank(plan, folder, expected):
    mesh = load_plan(shipped_plans("gpt_oss")[plan]).mesh
    prepared = prepare(folder, plan, mesh.world)
    for rank, seen in enumerate(ranks(mesh.world).run(observe, folder, plan, mesh.world)):
        whole = expected[mesh.coords(rank).dp]
        for ours, theirs in zip(seen.logits, whole.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(seen.grads, whole.grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        planned = prepared.rank_plan(rank)
        names = (planned.dispatch.prefill, planned.dispatch.decode)
        for sent, dispatch in zip(seen.sent, names, strict=True):
            assert sent == forecast(prepared, planned, dispatch)


def forecast(prepared, planned, dispatch) -> list[tuple[str, str, str]]:
    """The family's own list, with what is sent in each layer repeated."""
    steps = prepared.family.collectives(prepared.spec, planned.mesh, planned.cuts, dispatch)
    layers = [s for s in steps if s.per_layer] * prepared.spec.num_hidden_layers
    once = [s for s in steps if not s.per_layer]
    before = [s for s in once if s.name == "embed"]
    after = [s for s in once if s.name != "embed"]
    return [(s.name, s.op, s.group) for s in (*before, *layers, *after)]


def test_one_rank_sends_nothing(expected):
    assert [seen.sent for seen in expected] == [[[], []], [[], []]]
    assert all(grad.abs().max() > 1e-3 for grad in expected[0].grads)
