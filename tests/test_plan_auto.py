"""auto: by time where the device is known, else by memory; its file gives the same plan again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoint_files import lay_out
from headers import make_config, write_folder
from weighed import BIG, found, model_of, names

from tpx.errors import PlanError
from tpx.families import family_of
from tpx.index import CheckpointIndex
from tpx.mesh import Mesh
from tpx.plan.auto import meshes, plan_of, weigh_plan
from tpx.plan.curve import Curve
from tpx.plan.cuts import cuts_of
from tpx.plan.find import plans_for_world, shipped_plans
from tpx.plan.links import Key, Table
from tpx.plan.load import load_plan, parse_plan
from tpx.plan.prepare import prepare
from tpx.plan.proofs import prove
from tpx.plan.reason import auto_plan
from tpx.plan.topology import span_of
from tpx.plan.wants import Wants, Work
from tpx.plan.write import to_yaml

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def gpt_oss_120b(tmp_path_factory):
    return lay_out(DATA / "gpt-oss-120b.json.gz", tmp_path_factory.mktemp("120b"))


def auto(folder, world, memory=None, **config):
    made = make_config(**config)
    write_folder(folder, made)
    family = family_of(made)
    spec = family.spec(made)
    layout, index = family.layout(spec), CheckpointIndex.open(folder)
    plan, text = auto_plan(spec, layout, index, Wants(world, memory), family.collectives)
    assert prove(plan, spec, layout, index, world)
    return plan, text


def fullest(prepared) -> int:
    from tpx.plan.explain import explain

    return max(explain(prepared).rank_bytes)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_no_shipped_plan_needs_less_memory(gpt_oss_120b, world):
    chosen = prepare(gpt_oss_120b, "auto", world)
    others = [prepare(gpt_oss_120b, name, world) for name in plans_for_world("gpt_oss", world)]
    assert fullest(chosen) == min(fullest(other) for other in others)


@pytest.mark.parametrize(
    ("world", "mesh", "gigabytes"),
    [
        (1, Mesh(), 65.249),
        (2, Mesh(tp=2, ep=2), 32.638),
        (4, Mesh(tp=4, ep=4), 16.333),
        (8, Mesh(tp=8, ep=8), 8.180),
    ],
)
def test_gpt_oss_120b_by_memory(gpt_oss_120b, world, mesh, gigabytes):
    chosen = prepare(gpt_oss_120b, "auto", world)
    assert chosen.plan.mesh == mesh
    assert round(fullest(chosen) / 1e9, 3) == gigabytes


def test_auto_on_one_rank_holds_what_tp1_holds(tmp_path):
    folder = str(write_folder(tmp_path))
    one, auto = prepare(folder, "tp1", 1), prepare(folder, "auto", 1)
    assert auto.plan.mesh == one.plan.mesh
    assert {n: s.ranges for n, s in auto.rank_plan(0).shards.items()} == {
        n: s.ranges for n, s in one.rank_plan(0).shards.items()
    }


@pytest.mark.parametrize("world", [*range(1, 18), 24, 32, 48, 63, 64])
def test_there_is_a_plan_for_any_world_and_its_file_is_the_same_plan(tmp_path, world):
    plan, text = auto(tmp_path, world)
    assert plan.mesh.world == world
    assert parse_plan(text, "auto") == plan
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    again = prepare(str(tmp_path), str(path), world)
    assert again.digest == prepare(str(tmp_path), "auto", world).digest


def test_its_reason_is_a_comment(tmp_path):
    text = auto(tmp_path, 2)[1]
    assert text.splitlines()[:4] == [
        "# Chosen for 2 ranks by memory: tp 2 x ep 2.",
        "# The fullest rank holds 0.000 GB of weights and 0.000 GB of KV cache",
        "# (at 2 sequences of 256 tokens in all).",
        "# Next of 5 that fit: tp 2 x etp 2, as many bytes, but more traffic or axes.",
    ]


def test_it_says_uneven_where_it_chose_such_a_split(tmp_path):
    plan, text = auto(tmp_path, 2, num_local_experts=3, intermediate_size=224)
    assert plan.mesh == Mesh(tp=2, etp=2)
    assert "model.layers.*.mlp.experts:                      {style: expert, uneven: true}" in text
    even, text = auto(tmp_path, 2, num_local_experts=3, intermediate_size=256)
    assert even.mesh == Mesh(tp=2, etp=2)
    assert "uneven" not in text


def test_heads_that_tp_does_not_divide_stay_whole(tmp_path):
    plan, _ = auto(tmp_path, 3, num_local_experts=9, num_key_value_heads=8, hidden_size=2880)
    styles = {rule.pattern: rule.style for rule in plan.rules}
    assert plan.mesh == Mesh(tp=3, ep=3)
    assert styles["model.layers.*.self_attn.{q,k,v,o}_proj"] == "replicate"
    assert styles["model.embed_tokens"] == "vocab"


def test_what_does_not_fit_says_how_much_is_missing(tmp_path):
    with pytest.raises(PlanError) as error:
        auto(tmp_path, 2, memory=1000)
    found = re.fullmatch(
        "no plan for 2 ranks fits 1,000 bytes: the smallest, dp 2 x ep 2, needs ([0-9,]+) on its "
        "fullest rank, ([0-9,]+) of them weights",
        error.value.message,
    )
    assert found is not None, error.value.message
    needs, weights = (int(one.replace(",", "")) for one in found.groups())
    assert weights == 201_664
    assert 300e6 < needs < 310e6  # torch itself, which is estimated
    assert error.value.hint == "use more ranks, or a smaller `--context` or `--batch`"


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_every_candidate_passes_the_proofs(tmp_path, world):
    config = make_config(num_hidden_layers=1)
    write_folder(tmp_path, config)
    index, model = CheckpointIndex.open(tmp_path), model_of(num_hidden_layers=1)
    search = found(model, world)
    for one in search.fit:
        plan = plan_of(one, model.spec, model.layout)
        assert prove(plan, model.spec, model.layout, index, world)
        assert parse_plan(to_yaml(plan), "auto").mesh == one.mesh
    assert len({names(one) for one in search.fit}) == len(search.fit)


def test_every_shipped_plan_is_a_candidate():
    """But for words that mean what `auto` means."""
    model = model_of()
    for name, path in shipped_plans("gpt_oss").items():
        plan = load_plan(path)
        search = found(model, plan.mesh.world)
        one = weigh_plan(model, plan, search.work)
        cuts = [cuts_of(model.layout, c.cut, c.mesh, c.mesh.coords(0)) for c in search.fit]
        known = [(c.mesh, held, c.dispatch) for c, held in zip(search.fit, cuts, strict=True)]
        mine = cuts_of(model.layout, one.cut, one.mesh, one.mesh.coords(0))
        assert (one.mesh, mine, one.dispatch) in known, name


def test_on_a_gpu_time_decides_and_memory_limits_it():
    model = model_of(**BIG)
    free, tight = (found(model, 8, memory=limit) for limit in (None, 20 * 10**9))
    assert free.fit[0].mesh == Mesh(dp=8, edp=8)  # each its own sequence, and nothing to send
    assert tight.fit[0].mesh != free.fit[0].mesh
    assert tight.fit[0].memory.total <= 20 * 10**9 < free.fit[0].memory.total
    assert tight.fit[0].cost.seconds > free.fit[0].cost.seconds
    assert {*map(names, tight.fit)} | {*map(names, tight.big)} == {*map(names, free.fit)}
    seconds = [one.cost.seconds for one in free.fit]
    assert seconds == sorted(seconds)


def test_one_sequence_alone_is_cut_over_ranks_and_many_prompts_are_dealt():
    model = model_of(**BIG)
    alone = found(model, 4, phase="decode", batch=1).fit[0].mesh
    prompts = found(model, 4, phase="prefill", batch=64).fit[0].mesh
    assert alone.tp > 1
    assert prompts.dp == 4


def test_slow_links_between_nodes_keep_collectives_inside_them():
    model = model_of(**BIG)
    slow = found(model, 16, topology="2x8,inter=0.1", memory=20 * 10**9, batch=16)
    best = slow.fit[0].mesh
    for group in ("tp", "ep", "etp", "expert", "gather"):
        assert not span_of(best, group, slow.work.topology).crosses, best


def test_a_measured_table_changes_the_choice():
    """The same groups, a hundred times slower than stated."""
    model = model_of(**BIG)
    sizes = [2**power for power in range(10, 27, 2)]
    slow = Curve.of(sizes, [1e-3 + n / 1e9 for n in sizes])
    key = Key("h100", "1x8", {})
    ops = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    table = Table(key, {(op, n, n): slow for op in ops for n in (2, 4, 8)})
    settings = {"phase": "decode", "batch": 1}
    stated = found(model, 8, **settings).fit[0]
    measured = found(model, 8, table=table, **settings).fit[0]
    assert stated.mesh.tp > 1
    assert measured.links == 0
    assert measured.mesh == Mesh(dp=8, edp=8)


@pytest.mark.parametrize(
    ("wants", "message"),
    [
        ({"world": 0}, "`--world` is `0`"),
        ({"world": 70_000}, "`--world 70000` is more ranks than 16,384"),
        ({"world": 2, "context": 300}, "`--context 300` is more than the model's 256 positions"),
    ],
)
def test_wants_that_no_plan_can_serve(wants, message):
    model = model_of()
    with pytest.raises(PlanError) as error:
        Work.of(Wants(**wants), model.spec)
    assert error.value.message == message


@pytest.mark.parametrize("world", range(1, 40))
def test_every_mesh_is_tried_once(world):
    found = list(meshes(world))
    assert len(set(found)) == len(found)
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    every = set()
    for tp in sizes:
        for ep in sizes:
            for etp in sizes:
                if world % (ep * etp) == 0:
                    try:
                        every.add(Mesh(world // tp, tp, world // (ep * etp), ep, etp))
                    except PlanError:
                        continue
    assert set(found) == every
