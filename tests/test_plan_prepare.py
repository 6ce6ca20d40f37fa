"""prepare(): all checks in one call, a digest, and the collectives that a run must record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from headers import make_config, write_folder

from tpx.errors import CheckpointError, PlanError
from tpx.families.steps import Collective, MoE, moe_collectives
from tpx.mesh import Mesh
from tpx.plan.auto import meshes
from tpx.plan.dispatch import choose_dispatch
from tpx.plan.find import plan_folder
from tpx.plan.prepare import prepare
from tpx.plan.types import DispatchPlan, Plan


def planned(folder, name, world, phase="prefill", **config):
    write_folder(folder, make_config(**config))
    prepared = prepare(str(folder), name, world)
    mine = prepared.rank_plan(0)
    word = getattr(mine.dispatch, phase)
    return prepared.family.collectives(prepared.spec, mine.mesh, mine.cuts, word)


H, K, V = 64, 2, 131
REACHED = 2 * (1 - (4 * 3 / 2) / (8 * 7 / 2))  # of 2 ranks with 4 of 8 experts each, top-2


def dense(name, op="all_reduce", elements=H, per_layer=False):
    return Collective(name, op, "tp", elements, 2, per_layer)


EMBED, HEAD = dense("embed"), dense("head", "all_gather", 66)
ATTENTION = dense("attention", per_layer=True)


def moe(name, op, group, elements, itemsize=2, per_token=True):
    return Collective(name, op, group, elements, itemsize, True, per_token)


A2A = [
    moe("moe.counts", "all_to_all", "ep", 2, 8, per_token=False),
    moe("moe.tokens", "all_to_all", "ep", REACHED * H),
    moe("moe.ids", "all_to_all", "ep", REACHED * K, 8),
    moe("moe.weights", "all_to_all", "ep", REACHED * K),
]
BACK = moe("moe.return", "all_to_all", "ep", REACHED * H)
COMBINE = moe("moe.combine", "all_reduce", "expert", H)
GATHER = [
    moe("moe.gather_tokens", "all_gather", "gather", H),
    moe("moe.gather_ids", "all_gather", "gather", K, 8),
    moe("moe.gather_weights", "all_gather", "gather", K),
    moe("moe.scatter", "reduce_scatter", "gather", 2 * H),
]
PLANNED = {
    ("tp1", 1): [],
    ("tp2", 2): [EMBED, ATTENTION, HEAD],
    ("ep2", 2): [COMBINE],
    ("tp2-ep2", 2): [EMBED, ATTENTION, COMBINE, HEAD],
    ("tp2-etp2", 2): [EMBED, ATTENTION, COMBINE, HEAD],
    ("dp2-ep2", 2): [*A2A, BACK],
    ("dp2-ep2-gather", 2): GATHER,
    ("dp2-tp2-edp2-ep2", 4): [EMBED, ATTENTION, COMBINE, HEAD],
    ("dp2-tp2-ep2-etp2", 4): [
        *(EMBED, ATTENTION, *A2A),
        moe("moe.etp", "all_reduce", "etp", REACHED * H),
        *(BACK, HEAD),
    ],
}


@pytest.mark.parametrize(("name", "world"), PLANNED)
def test_the_collectives_of_a_forward(tmp_path, name, world):
    assert list(planned(tmp_path, name, world)) == PLANNED[name, world]


def test_ranks_of_a_tp_group_send_a_slice_of_their_tokens_each(tmp_path):
    found = {step.name: step for step in planned(tmp_path, "dp2-tp2-ep4", 4)}
    hit = 4 * (1 - (6 * 5 / 2) / (8 * 7 / 2))  # of 4 ranks with 2 of 8 experts each
    assert found["moe.tokens"].elements == pytest.approx(hit * H / 2)
    assert found["moe.slices"] == moe("moe.slices", "all_gather", "slice", H / 2)


def test_a_whole_table_and_float32_show_in_the_collectives(tmp_path):
    found = planned(tmp_path, "tp2-ep2", 2, torch_dtype="float32", tie_word_embeddings=True)
    assert [step.itemsize for step in found] == [4, 4, 4, 4]
    assert found[-1] == Collective("head", "all_gather", "tp", 66, 4, False)


def auto_word(mesh: Mesh) -> DispatchPlan:
    return choose_dispatch(Plan("p", "m", mesh, ()))


def test_auto_dispatch_follows_what_the_ranks_of_an_expert_group_see():
    assert auto_word(Mesh(tp=4, edp=4)) == ("local", "local")
    assert auto_word(Mesh(tp=4, ep=2, edp=2)) == ("replicated", "replicated")
    assert auto_word(Mesh(dp=2, tp=2, ep=2, edp=2)) == ("replicated", "replicated")
    assert auto_word(Mesh(dp=2, tp=2, ep=4)) == ("all_to_all", "gather")


@pytest.mark.parametrize("world", range(1, 17))
def test_every_mesh_has_a_dispatch_whose_groups_have_peers(world):
    for mesh in meshes(world):
        for name in auto_word(mesh):
            steps = moe_collectives(mesh, MoE(H, K, 16, 2), name)
            assert all(mesh.size(step.group) > 1 for step in steps)
            assert bool(steps) == (mesh.expert_size > 1)


def test_the_digest_tells_plan_config_headers_and_nothing_else(tmp_path):
    first = prepare(str(write_folder(tmp_path / "a")), "tp2-ep2", 2).digest
    assert prepare(str(write_folder(tmp_path / "copy")), "tp2-ep2", 2).digest == first
    commented = tmp_path / "mine.yaml"
    shipped = (plan_folder() / "gpt_oss" / "tp2-ep2.yaml").read_text()
    commented.write_text("# more words\n" + shipped)
    assert prepare(str(tmp_path / "a"), str(commented), 2).digest == first
    others = [
        prepare(str(tmp_path / "a"), "ep2", 2),
        prepare(str(write_folder(tmp_path / "b", make_config(eos_token_id=3))), "tp2-ep2", 2),
        prepare(str(write_folder(tmp_path / "c", shards=2)), "tp2-ep2", 2),
    ]
    assert len({first, *(other.digest for other in others)}) == 4


def test_the_plans_text_loads_to_the_same_plan(tmp_path):
    prepared = prepare(str(write_folder(tmp_path)), "dp2-tp2-ep2-etp2", 4)
    path = tmp_path / "again.yaml"
    path.write_text(prepared.plan_text())
    again = prepare(str(tmp_path), path, 4)
    assert again.digest == prepared.digest
    assert [again.rank_plan(r).cuts for r in range(4)] == [
        prepared.rank_plan(r).cuts for r in range(4)
    ]


def test_generation_config_comes_with_it(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    assert prepare(tmp_path, "tp1", 1).generation_config == {"eos_token_id": [5]}


def test_a_plan_for_two_ranks_in_a_process_alone(tmp_path):
    with pytest.raises(PlanError) as error:
        prepare(str(write_folder(tmp_path)), "tp2", 1)
    assert error.value.message == (
        "plan `plans/gpt_oss/tp2.yaml` is for 2 ranks (tp 2 x edp 2), and there is 1"
    )


@pytest.mark.parametrize(("given", "kind"), [(3, "int"), (None, "NoneType"), (["tp2"], "list")])
def test_a_plan_of_another_type_is_an_error(tmp_path, given, kind):
    with pytest.raises(PlanError) as error:
        prepare(str(write_folder(tmp_path)), given, 1)
    assert error.value.message == f"tp_plan is a `{kind}`"


def test_a_model_is_found_before_its_plan_is_read(tmp_path):
    with pytest.raises(CheckpointError) as error:
        prepare(str(tmp_path), "no-such-plan", 1)
    assert error.value.message == f"folder `{tmp_path}` has no `config.json`"


def test_plans_are_found_from_any_directory(tmp_path, monkeypatch):
    folder = write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert prepare(folder.name and ".", "tp2-ep2", 2).plan.mesh.world == 2
    assert Path(plan_folder()).is_absolute()
