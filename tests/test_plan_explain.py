"""What explain predicts, against what real ranks load, hold and compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from headers import make_config, write_folder
from ranks import ranks
from tiny import tiny_checkpoint
from torch.profiler import ProfilerActivity, profile

import tpx
from tpx.engine.engine import Engine
from tpx.families.steps import ITEM_BYTES
from tpx.mesh import Mesh
from tpx.plan import buffers
from tpx.plan.buffers import Load, moments
from tpx.plan.explain import Explained, explain
from tpx.plan.find import plans_for_world
from tpx.plan.modules import modules_of
from tpx.plan.prepare import Prepared, prepare

PLANS = {world: plans_for_world("gpt_oss", world) for world in (1, 2, 4)}
LOAD = Load(context=50, batch=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("explain"))


def caches(llm: tpx.LLM) -> int:
    """Bytes of the engine's cache."""
    caches = llm.session.engine.runner.caches
    return sum(cache.k.nbytes + cache.v.nbytes for cache in caches)


def loaded(folder: Path, plans: list[str], load: Load) -> list[tuple[Any, int]]:
    """Of each plan: what all ranks report, and the bytes of this rank's cache."""
    found = []
    for plan in plans:
        sizes = {"context": load.context, "batch": load.batch}
        with tpx.LLM(folder, tp_plan=plan, device="cpu", **sizes) as llm:
            found.append((llm.report.ranks, caches(llm)))
    return found


@pytest.mark.parametrize("world", PLANS)
def test_ranks_read_and_hold_the_bytes_that_every_shipped_plan_predicts(tiny, world):
    by_rank = ranks(world).run(loaded, tiny, PLANS[world], LOAD)
    for at, plan in enumerate(PLANS[world]):
        explained = explain(prepare(tiny, plan, world), *LOAD)
        reports = by_rank[0][at][0]
        assert tuple(report.bytes_kept for report in reports) == explained.rank_bytes, plan
        assert tuple(report.bytes_held for report in reports) == explained.rank_bytes, plan
        for alike in explained.alike:
            for rank in alike.ranks:
                # dp groups after the first may get fewer sequences than were counted
                if prepare(tiny, plan, world).plan.mesh.coords(rank).dp == 0:
                    memory = alike.memory
                    assert by_rank[rank][at][1] == memory.kv_cache + memory.pages, plan


def peak(engine: Engine) -> int:
    """Bytes that a step allocates, at most at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.step()
    events = profiled.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("dtype", "load", "layers", "where"),
    [
        ("float32", Load(1024, 1), 2, "attention"),
        ("bfloat16", Load(1024, 1), 2, "attention"),
        ("float32", Load(2048, 1), 1, "attention"),  # the one layer sees its window only
        ("float32", Load(64, 8), 1, "experts"),
        ("bfloat16", Load(64, 8), 1, "experts"),
        ("float32", Load(2, 200), 1, "head"),
    ],
)
def test_activations_are_estimated_within_a_quarter(
    tmp_path, monkeypatch, dtype, load, layers, where
):
    monkeypatch.setattr("tpx.ops.cpu.calls._native", lambda: None)  # of torch's references
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8}
    sizes |= {"num_hidden_layers": layers, "max_position_embeddings": 4096, "head_dim": 32}
    if where == "head":
        sizes |= {"vocab_size": 30_000, "intermediate_size": 32}
    folder = tiny_checkpoint(tmp_path, **sizes)
    prepared = prepare(folder, "tp1", 1)
    spec = replace(prepared.spec, dtype=dtype)
    cuts = explain(prepared).alike[0].cuts
    found = moments(spec, Mesh(), cuts, "local", load)
    logits = buffers.logits_bytes(spec, load, Mesh())
    found["head"] += logits
    assert max(found, key=lambda name: found[name]) == where
    torch.set_num_threads(1)
    with tpx.LLM(folder, tp_plan="tp1", dtype=dtype, device="cpu", prefix_cache=False) as llm:
        params = tpx.SamplingParams(max_tokens=1)
        llm.session.put(llm._answers([[7] * load.context] * load.batch, params))
        engine = llm.session.engine
        for _ in range(-(-load.context * load.batch // buffers.STEP_TOKENS) - 1):
            engine.step()
        measured = peak(engine)
    assert max(found.values()) == pytest.approx(measured, rel=0.25), f"{found=} {measured=}"


def of(folder: Path, plan: str, world: int, **config: Any) -> tuple[Prepared, Explained]:
    prepared = prepare(write_folder(folder, make_config(**config)), plan, world)
    return prepared, explain(prepared)


def test_ranks_with_shards_of_one_size_are_in_one_group(tmp_path):
    """131 rows over 4 are 33, 33, 33, 32; 3 blocks over 4 are 1, 1, 1, 0."""
    _, explained = of(tmp_path, "tp4-etp4", 4)
    assert [alike.ranks for alike in explained.alike] == [(0, 1, 2), (3,)]
    assert explained.alike[1].cuts["I"].size == 0
    assert explained.alike[1].cuts["V"].size == 32


def test_bytes_of_the_rules_sum_to_a_ranks(tmp_path):
    _, explained = of(tmp_path, "tp4-ep2-etp2", 4)
    for at, alike in enumerate(explained.alike):
        kinds = [kind for row in explained.rows for kind in row.kinds]
        assert sum(kind.each[at] for kind in kinds) == alike.memory.weights


@pytest.mark.parametrize("name", [name for names in PLANS.values() for name in names])
def test_every_collective_is_some_rules(tmp_path, name):
    world = next(world for world, names in PLANS.items() if name in names)
    _, explained = of(tmp_path, name, world)
    there = {step.name for step in (*explained.prefill, *explained.decode)}
    assert {name for row in explained.rows for name in row.collectives} == there


def test_whole_modules_are_those_that_weights_call_replicated(tmp_path):
    for name, world in (("tp2", 2), ("ep2", 2), ("tp4-etp4", 4), ("dp2-ep2", 2)):
        prepared, explained = of(tmp_path, name, world)
        whole = sum(module.nbytes for module in explained.whole)
        assert whole / explained.checkpoint_bytes == pytest.approx(explained.replicated)
        assert prepared.world == world


@pytest.mark.parametrize(
    ("plan", "module", "advice"),
    [
        ("ep2", "model.layers.*.self_attn.q_proj", "`colwise` would cut it"),
        ("ep2", "model.embed_tokens", "`vocab` would cut it"),
        ("tp2", "model.layers.*.mlp.experts", "`expert` cuts it where `ep` or `etp` is over 1"),
        ("dp2-ep2", "lm_head", "`vocab` cuts it where `tp` is over 1"),
        ("tp2", "model.layers.*.mlp.router", "no style cuts it"),
        ("tp2", "model.layers.*.self_attn.o_proj.bias", "a bias on a sum, which is added once"),
    ],
)
def test_what_stays_whole_is_named_with_the_style_that_would_cut_it(tmp_path, plan, module, advice):
    _, explained = of(tmp_path, plan, 2)
    assert {whole.name: whole.advice for whole in explained.whole}[module] == advice


def test_tied_tables_are_held_once(tmp_path):
    config = {"tie_word_embeddings": True}
    prepared, explained = of(tmp_path, "tp2", 2, **config)
    assert "lm_head" not in modules_of(prepared.layout)
    head = explained.rows[-1]
    assert (head.nbytes, head.collectives) == (0, ("head",))
    first = explained.alike[0]
    assert sum(row.nbytes for row in explained.rows) == first.memory.weights


def test_a_longer_context_and_a_larger_batch_never_need_less(tmp_path):
    prepared = prepare(write_folder(tmp_path), "dp2-tp2-ep4", 4)
    for axis in range(2):
        before = 0
        for value in (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 256):
            asked = [16, 4]
            asked[axis] = value
            now = explain(prepared, *asked).alike[0].memory.total
            assert now >= before, f"{asked=}"
            before = now


def test_the_kv_cache_is_two_tensors_of_each_layer(tmp_path):
    """4 sequences over 2 dp groups, 1 of 2 KV heads; a sliding layer keeps 32 of 100 tokens."""
    prepared = prepare(write_folder(tmp_path), "dp2-tp2-ep4", 4)
    memory = explain(prepared, 100, 4).alike[0].memory
    item = ITEM_BYTES[prepared.spec.dtype]
    assert memory.kv_cache == 2 * 2 * (100 + 32) * 1 * prepared.spec.head_dim * item
