"""The cost model: its counts against enumeration and headers, its laws, and published times."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given, settings, strategies as st
from weighed import BIG, SMALLER, found, model_of, names, wants_of, work_of

from tpx.mesh import Mesh
from tpx.plan.auto import candidates, experts_of, plan_of, weigh, weigh_plan
from tpx.plan.busiest import busiest_rows, experts_touched
from tpx.plan.cost import Step, cost, expert_work, memory
from tpx.plan.cuts import cuts_of
from tpx.plan.device import DEVICES
from tpx.plan.memory import Weights
from tpx.plan.types import DispatchPlan, Plan
from tpx.plan.wants import PHASES, Work

SMALL = model_of()
LARGE = model_of(**BIG)


@pytest.mark.parametrize(
    ("experts", "top_k", "ep", "tokens"), [(4, 2, 2, 2), (6, 2, 3, 2), (6, 1, 2, 3), (4, 3, 4, 1)]
)
def test_the_busiest_ranks_experts_are_the_mean_over_every_routing(experts, top_k, ep, tokens):
    choices = list(itertools.combinations(range(experts), top_k))
    held = experts // ep
    most = [
        max(len({e for one in routing for e in one if e // held == r}) for r in range(ep))
        for routing in itertools.product(choices, repeat=tokens)
    ]
    assert experts_touched(experts, top_k, ep, tokens) == pytest.approx(statistics.mean(most))


def test_one_token_of_gpt_oss_touches_as_many_experts_as_is_known():
    """One token, four of 128 experts over 8 ranks; four of 32 over 2 and 4."""
    assert experts_touched(128, 4, 8, 1) == pytest.approx(1.62, abs=0.005)
    assert experts_touched(32, 4, 2, 1) == pytest.approx(2.70, abs=0.005)
    assert experts_touched(32, 4, 4, 1) == pytest.approx(2.05, abs=0.005)
    assert experts_touched(128, 4, 1, 1) == pytest.approx(4)
    assert experts_touched(128, 4, 1, 64) == pytest.approx(128 * (1 - (1 - 4 / 128) ** 64))
    assert (experts_touched(128, 4, 8, 0), experts_touched(128, 4, 8, 10**6)) == (0, 16)


def test_the_busiest_ranks_rows_are_near_those_of_drawn_routings():
    draw = random.Random(0)
    for tokens in (8, 64, 512):
        most = []
        for _ in range(200):
            rows = [0] * 8
            for _ in range(tokens):
                for expert in draw.sample(range(32), 4):
                    rows[expert // 4] += 1
            most.append(max(rows))
        assert busiest_rows(tokens, 4, 32, 8) == pytest.approx(statistics.mean(most), rel=0.06)
    assert busiest_rows(10, 4, 32, 1) == 40
    assert busiest_rows(1, 4, 8, 8) == 1  # a rank with one expert has no more rows than tokens


@pytest.mark.parametrize("model", [SMALL, LARGE, model_of(tie_word_embeddings=True)])
def test_what_a_step_reads_and_what_it_leaves_are_all_of_the_weights(model):
    """Weights are counted in three parts, which are the exact ones together."""
    work = work_of(model, 4)
    for one in candidates(model, work):
        cuts = cuts_of(model.layout, one.cut, one.mesh, one.mesh.coords(0))
        held = memory(model, one.mesh, cuts, one.dispatch, work)
        tables = [
            size * model.spec.hidden_size * 2
            for name, (_, start, stop) in cuts.items()
            if model.layout.dims[name].table and (size := stop - start)
        ]
        parts = [w.nbytes(cuts, model.layout) for w in (model.dense, model.experts)]
        assert held.weights == sum(parts) + sum(tables)
        assert held.weights == model.weights.nbytes(cuts, model.layout)
    assert isinstance(model.weights, Weights)


def test_a_token_alone_reads_what_can_be_counted_by_hand():
    """One rank, one sequence: dense weights, the head, four experts a layer, and the cache."""
    spec = LARGE.spec
    one = found(LARGE, 1, phase="decode", batch=1, context=1000).fit[0]
    expert = 3 * 2880 * 2880 // 2 + 3 * 2880 * 90 + (2 * 2880 + 2880) * 2
    attention = (4096 + 2 * 512) * (2880 + 1) + 2880 * (4096 + 1) + 64
    norms_and_router = 2 * 2880 + 128 * 2881
    layer = 2 * (attention + norms_and_router)
    nbytes = 36 * (layer + 4 * expert) + 2 * 2880 * (201088 + 1)
    assert one.cost.weights == pytest.approx(nbytes / 3.02e12, rel=1e-6)
    keys = 2 * 512 * 2 * 18 * (1000 + 128)
    assert one.cost.kv == pytest.approx(keys / 3.02e12)
    assert one.cost.links == 0
    assert one.cost.compute == pytest.approx(36 * 12 * 3e-6)
    assert one.memory.kv == keys
    assert spec.num_hidden_layers == 36


def test_cutting_inside_experts_evens_out_what_dealing_them_does_not():
    """At one token the busiest of eight ranks reads 1.62 experts, or an eighth of four."""
    works = [work_of(LARGE, 8, phase="decode", batch=1)] * 2
    dealt, cut = (
        weigh(LARGE, mesh, experts_of(LARGE.layout) | {"Q", "KV", "V", "V_head"},
              cuts_of(LARGE.layout, LARGE.layout.dims, mesh, mesh.coords(0)), "auto",
              DispatchPlan("replicated", "replicated"), work)
        for mesh, work in zip((Mesh(tp=8, ep=8), Mesh(tp=8, etp=8)), works, strict=True)
    )  # fmt: skip
    expert = 13.2e6 * 36 / 3.02e12
    more = (1.62 - 4 * 12 / 90) * expert  # 90 blocks over 8 ranks: the first holds 12
    assert dealt.cost.weights - cut.cost.weights == pytest.approx(more, rel=0.05)
    assert dealt.cost.links == cut.cost.links


@settings(deadline=None, max_examples=12)
@given(
    world=st.sampled_from([2, 4, 6, 8, 16]),
    batch=st.integers(1, 300),
    context=st.integers(1, 256),
    phase=st.sampled_from(PHASES),
)
def test_a_larger_batch_never_needs_less_memory(world, batch, context, phase):
    small, large = (
        {names(one): one.memory for one in candidates(SMALL, work)}
        for work in (
            work_of(SMALL, world, batch=b, context=context, phase=phase) for b in (batch, batch + 1)
        )
    )
    assert small.keys() == large.keys()
    for name, held in small.items():
        assert held.weights == large[name].weights
        assert held.kv <= large[name].kv
        assert held.buffers <= large[name].buffers


@settings(deadline=None, max_examples=8)
@given(
    world=st.sampled_from([(1, 4), (2, 4), (4, 2), (2, 8)]),
    speeds=st.lists(st.integers(1, 900), min_size=4, max_size=4),
    phase=st.sampled_from(PHASES),
    batch=st.integers(1, 100),
)
def test_more_bandwidth_makes_no_plan_slower_and_not_the_best_one(world, speeds, phase, batch):
    nodes, gpus = world
    (a, b), (c, d) = sorted(speeds[:2]), sorted(speeds[2:])
    slow, fast = (
        {names(one): one.cost.seconds for one in candidates(SMALL, work_of(
            SMALL, nodes * gpus, topology=f"{nodes}x{gpus},intra={x},inter={y}", phase=phase,
            batch=batch))}
        for x, y in ((a, c), (b, d))
    )  # fmt: skip
    assert all(fast[name] <= slow[name] * (1 + 1e-12) for name in slow)
    assert min(fast.values()) <= min(slow.values()) * (1 + 1e-12)


def test_a_device_that_is_faster_makes_no_plan_slower():
    times = [
        {names(one): one.cost.seconds for one in candidates(LARGE, work_of(LARGE, 8, device=d))}
        for d in ("h100", "h200")
    ]
    faster = DEVICES["h200"].matmul.value / DEVICES["h100"].matmul.value  # 788 of 798
    assert all(times[1][name] <= times[0][name] / faster for name in times[0])


@pytest.mark.parametrize("phase", PHASES)
def test_renaming_ranks_changes_nothing(phase):
    """Rank 0 costs the most; any other rank as much where the cut is even, else less."""
    work = work_of(LARGE, 8, phase=phase)
    for mesh in (Mesh(tp=8, ep=8), Mesh(dp=2, tp=4, ep=4, edp=2), Mesh(dp=4, tp=2, ep=8),
                 Mesh(tp=8, etp=8)):  # fmt: skip
        dispatch = DispatchPlan("replicated", "replicated")
        if mesh.expert_size > mesh.tp:
            dispatch = DispatchPlan("all_to_all", "gather")
        costs, held = [], []
        for rank in range(8):
            cuts = cuts_of(LARGE.layout, LARGE.layout.dims, mesh, mesh.coords(rank))
            costs.append(cost(LARGE, mesh, cuts, dispatch, work))
            held.append(memory(LARGE, mesh, cuts, dispatch, work))
        even = mesh.etp == 1
        assert len({*costs}) == (1 if even else 2)
        assert len({*held}) == (1 if even else 2)
        assert max(c.seconds for c in costs) == costs[0].seconds
        assert max(m.total for m in held) == held[0].total


@settings(deadline=None, max_examples=12)
@given(data=st.data(), world=st.sampled_from([2, 4, 8]))
def test_a_plans_cost_does_not_depend_on_the_order_of_its_rules(data, world):
    search = found(SMALL, world)
    one = data.draw(st.sampled_from(search.fit))
    plan = plan_of(one, SMALL.spec, SMALL.layout)
    rules = tuple(data.draw(st.permutations(plan.rules)))
    again = weigh_plan(SMALL, Plan("auto", plan.model, plan.mesh, rules), search.work)
    assert (again.cost, again.memory, again.dispatch) == (one.cost, one.memory, one.dispatch)


def test_the_parts_are_the_whole_and_lie_inside_the_band():
    for phase in PHASES:
        for one in found(LARGE, 8, phase=phase).fit:
            parts = (one.cost.weights, one.cost.compute, one.cost.kv, one.cost.links)
            assert min(parts) >= 0
            assert one.cost.seconds == pytest.approx(sum(parts))
            assert one.cost.low < one.cost.seconds < one.cost.high


def test_a_prompt_token_is_cheaper_than_a_written_one():
    decode, prefill, both = (
        found(LARGE, 8, phase=phase, batch=8).fit[0].cost.seconds
        for phase in ("decode", "prefill", "balanced")
    )
    assert prefill < decode / 100 < both
    assert decode < both


# Microseconds of the experts of one layer on an H100 SXM for so many tokens, as NVIDIA's
# aiconfigurator publishes them for vLLM 0.24: without communication, routed unevenly.
TOKENS = (1, 8, 64, 256, 1024, 4096)
PUBLISHED = [
    (SMALLER, Mesh(), (59, 122, 232, 366, 653, 1649)),
    (SMALLER, Mesh(tp=2, etp=2), (48, 78, 138, 207, 395, 942)),
    (SMALLER, Mesh(tp=2, ep=2), (73, 92, 151, 224, 402, 1158)),
    (BIG, Mesh(), (63, 194, 532, 757, 1375, 2590)),
    (BIG, Mesh(tp=2, etp=2), (47, 119, 302, 421, 770, 1435)),
    (BIG, Mesh(tp=2, ep=2), (97, 182, 353, 483, 764, 1444)),
]


def experts_alone(model, mesh, tokens) -> float:
    """Microseconds of a layer's experts, with 5 of its 12 operations."""
    work = Work.of(wants_of(mesh.world), model.spec)
    cuts = cuts_of(model.layout, experts_of(model.layout), mesh, mesh.coords(0))
    nbytes, flops = expert_work(model, mesh, cuts, "replicated", Step(tokens, tokens, tokens, 1, 1))
    device = work.device
    return 1e6 * (
        max(nbytes / device.read.value, flops / device.matmul.value) + 5 * device.operation.value
    )


def test_published_times_of_experts_lie_above_the_floor_and_not_far():
    shares = [
        us / experts_alone(model_of(**config), mesh, tokens)
        for config, mesh, row in PUBLISHED
        for tokens, us in zip(TOKENS, row, strict=True)
    ]
    assert 0.9 < min(shares) < max(shares) < 3.7
    assert 1.4 < statistics.median(shares) < 2.0


def test_a_published_step_lies_in_the_band():
    """20b, one H100, one sequence of 2,000 tokens: 3.22 ms a token (vLLM)."""
    one = found(model_of(**SMALLER), 1, phase="decode", batch=1, context=2048).fit[0].cost
    assert one.low < 3.22e-3 < one.high
