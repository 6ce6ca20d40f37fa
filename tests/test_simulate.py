"""One rank in one process: the calls of its forward are those that the plan predicts."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import lay_out
from headers import make_config, write_folder

from tpx.errors import PlanError
from tpx.mesh import Mesh
from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan
from tpx.plan.prepare import Prepared, prepare
from tpx.recording import Peers, RecordingGroups
from tpx.simulate import Row, narrow_plan, simulate

DATA = Path(__file__).parent / "data"
WIDE = make_config(
    num_local_experts=64, num_experts_per_tok=4, num_attention_heads=64, num_key_value_heads=8
)
PLANS = {name: load_plan(path).mesh.world for name, path in shipped_plans("gpt_oss").items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("wide"), WIDE))


def on_mesh(folder: str, mesh: str, target: Path, **experts: str) -> Prepared:
    """The plan that cuts everything, on another mesh; experts: options of their rule."""
    text = shipped_plans("gpt_oss")["tp4-etp4"].read_text()
    options = "".join(f", {key}: {value}" for key, value in experts.items())
    text = re.sub(r"mesh: .*", f"mesh: {{{mesh}}}", text).replace(", uneven: true", options)
    (target / "plan.yaml").write_text(text)
    sizes = {axis: int(size) for axis, size in re.findall(r"(\w+): (\d+)", mesh)}
    return prepare(folder, str(target / "plan.yaml"), Mesh(**sizes).world)


def differing(prepared: Prepared, rank: int, tokens: int) -> list[Row]:
    found = [simulate(prepared, rank, tokens, phase) for phase in ("prefill", "decode")]
    assert [s.phase for s in found] == ["prefill", "decode"]
    return [row for simulation in found for row in simulation.rows if not row.equal]


@pytest.mark.parametrize("name", PLANS)
def test_every_shipped_plan_calls_what_it_predicts_on_every_rank(small, name):
    prepared = prepare(small, name, PLANS[name])
    for rank in range(prepared.world):
        for tokens in (1, 5):  # fewer than ranks that share them out, and not divisible
            assert differing(prepared, rank, tokens) == []


MESHES = [
    ("tp: 8, ep: 8", {}),
    ("tp: 8, ep: 8", {"dispatch": "all_to_all"}),
    ("dp: 8, ep: 8", {}),
    ("dp: 4, tp: 2, ep: 4, etp: 2", {"uneven": "true"}),
    ("tp: 64, ep: 64", {}),
    ("dp: 8, tp: 8, ep: 64", {}),
    ("dp: 8, tp: 8, ep: 64", {"dispatch": "gather"}),
    ("dp: 16, tp: 4, edp: 2, ep: 16, etp: 2", {"uneven": "true"}),
    ("dp: 64, edp: 4, ep: 16", {}),
]


@pytest.mark.parametrize(("mesh", "experts"), MESHES, ids=str)
def test_plans_of_8_and_64_ranks_call_what_they_predict(wide, tmp_path, mesh, experts):
    prepared = on_mesh(wide, mesh, tmp_path, **experts)
    for rank in (0, prepared.world - 3):
        assert differing(prepared, rank, 13) == []


@pytest.mark.parametrize("world", [8, 64])
def test_auto_plans_call_what_they_predict(wide, world):
    prepared = prepare(wide, "auto", world)
    assert differing(prepared, world // 2, 6) == []


def test_calls_of_all_to_all_carry_the_rows_that_routing_decided(wide, tmp_path):
    prepared = on_mesh(wide, "dp: 4, tp: 2, ep: 8", tmp_path)
    found = simulate(prepared, 5, 13, "prefill")
    layers = prepared.spec.num_hidden_layers
    assert len(found.arrivals) == layers
    for layer, (sent, arrived) in enumerate(found.arrivals):
        begin = 1 + 7 * layer  # after the embedding
        records = {r.name: r for r in found.records[begin : begin + 7]}
        slice_of_rank = 6  # 13 tokens over 2 ranks are 7 and 6, and rank 5 is the second
        assert slice_of_rank <= sent <= 4 * slice_of_rank
        assert 0 < arrived <= 13 * 4
        assert sent != arrived
        rows = {name: record.shape[0] for name, record in records.items()}
        assert (rows["moe.tokens"], rows["moe.ids"], rows["moe.weights"]) == (sent,) * 3
        assert rows["moe.return"] == arrived
        assert rows["moe.slices"] == slice_of_rank
    other = simulate(prepared, 5, 13, "prefill", seed=1)
    assert other.equal
    assert other.arrivals != found.arrivals


def test_a_wrong_prediction_is_seen(small):
    prepared = prepare(small, "tp2-ep2", 2)

    def predicted_wrongly(change) -> list[Row]:
        def collectives(*given):
            return tuple(change(step) for step in prepared.family.collectives(*given))

        family = prepared.family._replace(collectives=collectives)
        return list(simulate(replace(prepared, family=family), 1, 5, "prefill").rows)

    def wider(step):
        return step._replace(elements=step.elements * (1 + (step.name == "moe.combine")))

    rows = predicted_wrongly(wider)
    assert [row.name for row in rows if not row.equal] == ["moe.combine"] * 2
    assert rows[2] == Row(0, "moe.combine", "all_reduce", "expert", 640, 320, False)

    def elsewhere(step):
        return step._replace(group="ep" if step.name == "moe.combine" else step.group)

    assert [row.equal for row in predicted_wrongly(elsewhere)].count(False) == 2

    family = prepared.family._replace(collectives=lambda *_: ())
    rows = list(simulate(replace(prepared, family=family), 1, 5, "prefill").rows)
    assert rows[0] == Row(None, "embed", "all_reduce", "tp", None, 320, False)
    assert len(rows) == 2 + 2 * 2


def test_a_call_that_is_missing_is_seen(small):
    prepared = prepare(small, "tp2-ep2", 2)

    def more(*given):
        steps = prepared.family.collectives(*given)
        return (*steps, steps[-1]._replace(name="late"))

    found = simulate(replace(prepared, family=prepared.family._replace(collectives=more)), 0, 3,
                     "decode")  # fmt: skip
    assert not found.equal
    assert found.rows[-1][1:] == ("late", "all_gather", "tp", 3 * 65 * 2, None, False)


def test_1024_ranks_of_the_largest_model_take_seconds_and_little_memory(tmp_path):
    """36 layers x 128 experts, and an odd rank of the mesh."""
    folder = str(lay_out(DATA / "gpt-oss-120b.json.gz", tmp_path / "120b"))
    prepared = on_mesh(folder, "dp: 128, tp: 8, edp: 8, ep: 128", tmp_path)
    begin = time.process_time()
    found = simulate(prepared, 517, 64, "prefill")
    assert time.process_time() - begin < 5
    assert found.equal
    assert len(found.rows) == 2 + 36 * 7  # attention, and six of the exchange
    rank_plan = narrow_plan(prepared, 517)
    assert rank_plan.cuts["E"].size == 1
    assert found.spec.num_hidden_layers == 36


def test_peers_send_rows_for_experts_that_are_here(wide, tmp_path):
    rank_plan = narrow_plan(on_mesh(wide, "dp: 8, ep: 8", tmp_path), 2)
    peers = Peers(rank_plan, 9, torch.Generator().manual_seed(0))
    counts = peers.counts(5)
    assert counts[2] == 5
    assert counts.tolist() == [5 if i == 2 else len(ids) for i, ids in enumerate(peers.drawn[0])]
    for ids in peers.drawn[0]:
        assert ((ids // 8 == 2).any(1)).all()
        assert all(len(set(row)) == 4 for row in ids.tolist())


def test_groups_of_one_rank_return_their_input_and_note_nothing(wide, tmp_path):
    rank_plan = narrow_plan(on_mesh(wide, "dp: 8, ep: 8", tmp_path), 2)
    groups = RecordingGroups(
        rank_plan.mesh, 2, Peers(rank_plan, 9, torch.Generator().manual_seed(0))
    )
    x = torch.ones(4, 3)
    for group in (groups["tp"], groups.none):
        assert group.all_reduce(x, "a") is group.all_gather(x, "b") is x
        assert group.reduce_scatter(x, "c") is group.all_to_all(x, [4], [4], "d") is x
    assert groups.records == []
    assert groups["ep"].reduce_scatter(torch.ones(8, 3), "e").shape == (1, 3)
    assert groups["ep"].all_gather(x[:2], "f", [1, 1, 2, 0, 0, 5, 1, 1]).shape == (11, 3)
    assert [(r.name, r.group, r.nbytes) for r in groups.records] == [
        ("e", "ep", 96),
        ("f", "ep", 24),
    ]


@pytest.mark.parametrize(
    ("rank", "tokens", "message", "hint"),
    [
        (2, 4, "the plan has no rank `2`", "its ranks are 0 to 1"),
        (-1, 4, "the plan has no rank `-1`", "its ranks are 0 to 1"),
        (0, 0, "`0` tokens are too few to simulate", "give 1 or more"),
    ],
)
def test_what_cannot_be_simulated_is_an_error(small, rank, tokens, message, hint):
    with pytest.raises(PlanError) as error:
        simulate(prepare(small, "tp2", 2), rank, tokens, "prefill")
    assert (error.value.message, error.value.hint) == (message, hint)
