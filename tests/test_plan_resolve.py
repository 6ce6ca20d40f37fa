"""RankPlans: all ranks together hold every element of every tensor, once a replica."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from headers import layout_of, make_config, write_folder
from hypothesis import example, given, settings, strategies as st

from tpx.families import family_of
from tpx.families.layout import Dim, Layout, Logical, Parameter, Source, whole
from tpx.families.steps import Cut
from tpx.index import DTYPE_BITS, CheckpointIndex, TensorMeta
from tpx.mesh import Mesh
from tpx.plan.find import shipped_plans
from tpx.plan.memory import Weights
from tpx.plan.prepare import prepare
from tpx.plan.proofs import prove
from tpx.plan.reason import auto_plan
from tpx.plan.resolve import resolve
from tpx.plan.types import Plan, RankPlan, Rule, Shard
from tpx.plan.wants import Wants

SPEC = family_of(make_config()).spec(make_config())


def numbered(metas: Iterable[TensorMeta]) -> dict[str, np.ndarray]:
    """Tensors whose elements are all different, so that any wrong place shows."""
    return {meta.name: np.arange(np.prod(meta.shape)).reshape(meta.shape) for meta in metas}


def read(shard: Shard, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """What a reader makes of a shard; -1 where no part writes."""
    found = np.full(shard.shape, -1)
    for part in shard.parts:
        picks = [np.concatenate([np.arange(*r) for r in ranges]) for ranges in part.index]
        piece = tensors[part.meta.name][np.ix_(*picks)]
        assert piece.shape == part.shape
        rank = found.ndim - piece.ndim
        where = [slice(at, at + 1) for at in part.at[:rank]]
        where += [slice(a, a + n) for a, n in zip(part.at[rank:], piece.shape, strict=True)]
        assert (found[tuple(where)] == -1).all(), "two parts write one place"
        found[tuple(where)] = piece
    return found


def whole_parameter(parameter: Parameter, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The parameter on one rank, put together from its sources by their definition."""
    found = np.full(parameter.shape, -1)
    for source in parameter.sources:
        begin = [slice(b, b + n) for b, n in zip(source.begin, source.shape, strict=True)]
        rank = len(parameter.shape) - len(source.shape)
        at = [slice(a, a + 1) for a in source.at[:rank]]
        at += [slice(a, a + n) for a, n in zip(source.at[rank:], source.shape, strict=True)]
        found[tuple(at)] = tensors[source.tensor][tuple(begin)]
    assert (found >= 0).all()
    return found


def check_ranks(plans: list[RankPlan], layout: Layout, index: CheckpointIndex) -> None:
    """Every rank holds what its ranges say, and the ranks cover each element equally often."""
    tensors = numbered(index.tensors.values())
    for name, parameter in layout.parameters.items():
        if parameter.tied_to:
            assert all(p.shards[name].parts == () for p in plans)
            continue
        full = whole_parameter(parameter, tensors)
        times_held = np.zeros(parameter.shape, int)
        for plan in plans:
            shard = plan.shards[name]
            picks = [np.concatenate([np.arange(*r) for r in rs]) for rs in shard.ranges]
            assert shard.shape == tuple(map(len, picks))
            assert (read(shard, tensors) == full[np.ix_(*picks)]).all(), name
            times_held[np.ix_(*picks)] += 1
        assert times_held.min() == times_held.max() >= 1, f"{name} is held {set(times_held.flat)}"


AWKWARD = {
    "vocabulary 131": {"vocab_size": 131},
    "vocabulary 257, plain": {"vocab_size": 257, "quantization_config": None},
    "7 blocks": {"intermediate_size": 224},
    "3 blocks, plain": {"intermediate_size": 96, "quantization_config": None},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("sizes", AWKWARD)
@pytest.mark.parametrize("name", shipped_plans("gpt_oss"))
def test_the_ranks_of_a_shipped_plan_cover_every_element_once_a_replica(tmp_path, name, sizes):
    config = make_config(num_hidden_layers=1, num_local_experts=4, **AWKWARD[sizes])
    write_folder(tmp_path, config, shards=2)
    world = {"1": 1, "2": 2, "4": 4}[next(c for c in reversed(name) if c in "124")]
    world = 4 if name.startswith(("dp2-tp2", "tp4")) else 2 if name != "tp1" else world
    world = 4 if name == "ep4" else world
    prepared = prepare(str(tmp_path), name, world)
    plans = [prepared.rank_plan(rank) for rank in range(world)]
    check_ranks(plans, prepared.layout, prepared.index)
    weights = Weights.of(prepared.layout, prepared.index)
    for plan in plans:
        held = [s.numel * DTYPE_BITS[s.dtype] // 8 for s in plan.shards.values() if not s.tied_to]
        assert weights.nbytes(plan.cuts, prepared.layout) == sum(held)
        parts = [part for s in plan.shards.values() for part in s.parts]
        read_bytes = sum(np.prod(p.shape) * DTYPE_BITS[p.meta.dtype] // 8 for p in parts)
        assert read_bytes == sum(held)


@settings(deadline=None, max_examples=30)
@given(
    world=st.integers(1, 8),
    vocab=st.integers(1, 40),
    blocks=st.integers(1, 9),
    heads=st.sampled_from([(8, 8), (8, 2), (6, 3), (12, 4), (5, 1)]),
    experts=st.integers(1, 9),
    plain=st.booleans(),
)
# Of two ranks that share each expert one holds nothing: the sum is whole before it is last added.
@example(world=6, vocab=1, blocks=1, heads=(8, 8), experts=9, plain=False)
def test_the_ranks_of_any_auto_plan_cover_every_element(
    tmp_path_factory, world, vocab, blocks, heads, experts, plain
):
    folder = tmp_path_factory.mktemp("any")
    changes = {"quantization_config": None} if plain else {}
    config = make_config(
        num_hidden_layers=1, vocab_size=vocab, hidden_size=32, intermediate_size=32 * blocks,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=2,
        num_local_experts=experts, num_experts_per_tok=1, **changes,
    )  # fmt: skip
    write_folder(folder, config)
    prepared = prepare(str(folder), "auto", world)
    plans = [prepared.rank_plan(rank) for rank in range(world)]
    check_ranks(plans, prepared.layout, prepared.index)
    for plan in plans:
        slots = {(o, s) for o, s in zip(plan.owner_E, plan.slot_E, strict=True)}
        assert len(slots) == experts
        mine = plan.mesh.coords(plan.rank).ep
        first, last = plan.cuts["E"].start, plan.cuts["E"].stop
        assert [e for e in range(experts) if plan.owner_E[e] == mine] == list(range(first, last))


def prepared_for(tmp_path, name: str, world: int, **config):
    write_folder(tmp_path, make_config(**config))
    return prepare(str(tmp_path), name, world)


def test_ranks_with_fewer_blocks_than_ranks_hold_nothing_and_take_part(tmp_path):
    prepared = prepared_for(tmp_path, "tp4-etp4", 4, intermediate_size=96)
    last = prepared.rank_plan(3)
    down = last.shards["model.layers.0.mlp.experts.down_proj_blocks"]
    assert (down.shape, down.parts, down.dtype) == ((8, 64, 0, 16), (), "U8")
    assert last.shards["model.layers.0.mlp.experts.gate_up_proj_bias"].shape == (8, 0)
    assert last.cuts["I"] == Cut("etp", 96, 96)


def test_key_heads_fewer_than_ranks_are_shared_by_neighbours(tmp_path):
    prepared = prepared_for(tmp_path, "tp4-ep4", 4)
    cuts = [prepared.rank_plan(rank).cuts for rank in range(4)]
    assert [c["KV"] for c in cuts] == [Cut("tp", 0, 1), Cut("tp", 0, 1)] + [Cut("tp", 1, 2)] * 2
    assert [c["Q"] for c in cuts] == [Cut("tp", i, i + 2) for i in (0, 2, 4, 6)]


@settings(deadline=None)
@given(groups=st.integers(1, 6), kv=st.integers(1, 8), tp=st.integers(1, 48))
def test_a_ranks_query_heads_are_the_groups_of_its_key_heads(groups, kv, tp):
    from tpx.plan.cuts import cuts_of, divides

    layout = layout_of(make_config(num_attention_heads=groups * kv, num_key_value_heads=kv))
    if not (divides(layout.dims["Q"], tp) and divides(layout.dims["KV"], tp)):
        return
    for rank in range(tp):
        mesh = Mesh(tp=tp, edp=tp)
        cuts = cuts_of(layout, {"Q", "KV"}, mesh, mesh.coords(rank))
        used = {head // groups for head in range(cuts["Q"].start, cuts["Q"].stop)}
        assert used == set(range(cuts["KV"].start, cuts["KV"].stop))


def test_biases_on_partial_sums_are_added_once(tmp_path):
    def once(name):
        shards = prepared_for(tmp_path, name, 2).rank_plan(1).shards
        return {n.removeprefix("model.layers.0.") for n, s in shards.items() if s.add_once} & {
            "self_attn.o_proj.bias",
            "mlp.experts.down_proj_bias",
            "mlp.experts.gate_up_proj_bias",
            "self_attn.q_proj.bias",
        }

    assert once("tp2-etp2") == {"self_attn.o_proj.bias", "mlp.experts.down_proj_bias"}
    assert once("tp2-ep2") == {"self_attn.o_proj.bias"}
    assert once("ep2") == set()


def test_an_axis_of_one_rank_cuts_nothing(tmp_path):
    cuts = prepared_for(tmp_path, "tp1", 1).rank_plan(0).cuts
    assert {cut.axis for cut in cuts.values()} == {None}


def synthetic() -> tuple[Layout, dict[str, TensorMeta]]:
    """What gpt-oss does not have: fused QKV, concatenated gate and up, a stack of experts."""
    D, H, Q, KV, E, F = 2, 6, 4, 4, 4, 5
    dims = {
        "Q": Logical("Q", "num_attention_heads", Q, "tp"),
        "KV": Logical("KV", "num_key_value_heads", KV, "tp"),
        "E": Logical("E", "num_local_experts", E, "ep"),
        "F": Logical("F", "intermediate_size", F, "tp", uneven="yes"),
        "I": Logical("I", "intermediate_size", F, "etp", uneven="yes"),
    }
    hidden, kind = Dim("", H), ("BF16",)
    rows = {"q": ("Q", Q * D, 0), "k": ("KV", KV * D, Q * D), "v": ("KV", KV * D, (Q + KV) * D)}
    found = [
        Parameter(
            f"attn.{name}.weight",
            (Dim(logical, size // D, inner=D), hidden),
            kind,
            (Source("attn.qkv.weight", (begin, 0), (size, H), (0, 0)),),
        )
        for name, (logical, size, begin) in rows.items()
    ]
    found.append(whole("mlp.gate_up.weight", Dim("F", F, outer=2), hidden, dtypes=kind))
    found.append(whole("mlp.down.weight", hidden, Dim("F", F), dtypes=kind))
    # gate [F, H] and up [F, H] of each expert, as two tensors, stacked to [E, 2F, H]
    stack = tuple(
        Source(f"experts.{e}.{name}.weight", (0, 0), (F, H), (e, half * F, 0))
        for e in range(E)
        for half, name in enumerate(("gate", "up"))
    )
    experts = (Dim("E", E), Dim("I", F, outer=2), hidden)
    found.append(Parameter("experts.gate_up", experts, kind, stack))
    shapes = {"attn.qkv.weight": ((Q + 2 * KV) * D, H)}
    shapes |= {"mlp.gate_up.weight": (2 * F, H), "mlp.down.weight": (H, F)}
    shapes |= {source.tensor: (F, H) for source in stack}
    metas = {n: TensorMeta(n, "f", "BF16", s, 0, 2 * s[0] * s[1]) for n, s in shapes.items()}
    return Layout(dims, {p.name: p for p in found}, together=(("Q", "KV"),)), metas


@pytest.mark.parametrize(
    "mesh", [Mesh(), Mesh(tp=2, ep=2), Mesh(tp=4, ep=2, etp=2), Mesh(tp=4, edp=4)]
)
def test_fused_concatenated_and_stacked_tensors_are_cut_like_any_other(tmp_path, mesh):
    layout, metas = synthetic()
    index = CheckpointIndex(tmp_path, metas, {"f": 0}, "")
    styles = {
        "attn": "colwise",
        "mlp.gate_up": "colwise",
        "mlp.down": "rowwise",
        "experts": "expert",
    }
    rules = tuple(Rule(name, style, 1) for name, style in styles.items())
    plan = Plan("p", SPEC.model_type, mesh, rules)
    assert prove(plan, SPEC, layout, index, mesh.world)
    plans = [resolve(plan, SPEC, layout, index, rank) for rank in range(mesh.world)]
    check_ranks(plans, layout, index)
    if mesh.tp == 4:  # two halves of gate and up, from the same tensor, in one part
        (part,) = plans[0].shards["mlp.gate_up.weight"].parts
        assert part.index == (((0, 2), (5, 7)), ((0, 6),))
    if mesh.ep == 2:  # only the tensors of this rank's own experts
        parts = plans[-1].shards["experts.gate_up"].parts
        assert {part.meta.name.split(".")[1] for part in parts} == {"2", "3"}


def test_the_walk_of_one_parameter_in_the_design():
    """gpt-oss-120b at ep 8, rank 5: experts 80 to 96, 132,710,400 bytes, one span."""
    config = make_config(
        num_local_experts=128, hidden_size=2880, intermediate_size=2880, vocab_size=16,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_hidden_layers=4,
    )  # fmt: skip
    layout = layout_of(config)
    spec = family_of(config).spec(config)
    metas = {
        name: TensorMeta(name, "f", p.dtypes[0], p.shape, 0, 0)
        for name, p in layout.parameters.items()
    }
    from pathlib import Path

    index = CheckpointIndex(Path(), metas, {}, "")
    plan, _ = auto_plan(spec, layout, index, Wants(8), family_of(config).collectives)
    shard = resolve(plan, spec, layout, index, 5).shards[
        "model.layers.3.mlp.experts.gate_up_proj_blocks"
    ]
    assert shard.ranges == (((80, 96),), ((0, 5760),), ((0, 90),), ((0, 16),))
    assert shard.numel == 132_710_400
