"""auto: memory first, for any world, as a file that gives the same plan again."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_files import lay_out
from headers import make_config, write_folder

from tpx.errors import PlanError
from tpx.families import family_of
from tpx.index import CheckpointIndex
from tpx.mesh import Mesh
from tpx.plan.auto import auto_plan, meshes
from tpx.plan.find import plans_for_world
from tpx.plan.load import parse_plan
from tpx.plan.prepare import prepare
from tpx.plan.proofs import prove

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
    plan, text = auto_plan(spec, layout, index, world, memory, family.collectives)
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
        "# (at one sequence of 256 tokens a rank).",
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
    assert error.value.message == (
        "no plan for 2 ranks fits 1,000 bytes: the smallest, tp 2 x ep 2, needs 180,528 on its "
        "fullest rank"
    )
    assert error.value.hint == "use more ranks"


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
