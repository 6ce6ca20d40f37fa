"""A sharded checkpoint before it is read: what each rank reads of it, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import lay_out
from headers import CONFIG, make_config, write_folder
from sharded import AGAIN, check_one_span, lay_out_sharded, two_ranks

from tpx.cli.main import main
from tpx.errors import CheckpointError, PlanError, TpxError
from tpx.plan.find import read_plan, shipped_plans
from tpx.plan.manifest import file_name
from tpx.plan.prepare import prepare
from tpx.plan.presharded import open_presharded

DATA = Path(__file__).parent / "data"
SOON = ["tp1", "tp4-etp4", "dp2-tp2-ep2-etp2"]
PLANS = [
    pytest.param(plan, marks=() if plan in SOON else pytest.mark.more)
    for plan in shipped_plans("gpt_oss")
]
ITS_OWN = (
    "leave the plan out, since a sharded checkpoint brings its own, or shard the original by this "
    "one: `tpx shard --tp-plan PLAN`"
)
# Odd sizes: scales and tables that end on no multiple of a wider element.
ODD = make_config(num_local_experts=4, vocab_size=131, intermediate_size=96, hidden_size=32)


def world_of(plan: str) -> int:
    return read_plan(plan, "gpt_oss").mesh.world


@pytest.fixture
def two(tmp_path) -> Path:
    return two_ranks(tmp_path)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_reads_its_file_in_one_stretch_and_in_the_arenas_order(tmp_path, plan, tied):
    whole = write_folder(tmp_path / "whole", ODD | {"tie_word_embeddings": tied}, shards=3)
    original = prepare(whole, plan, world_of(plan))
    prepared = prepare(lay_out_sharded(original, tmp_path / "out"), "auto", original.world)
    check_one_span(prepared)
    for rank in range(prepared.world):
        was, now = original.rank_plan(rank), prepared.rank_plan(rank)
        assert list(was.shards) == list(now.shards)
        for name, shard in was.shards.items():
            mine = now.shards[name]
            assert (mine.shape, mine.dtype, mine.ranges) == (shard.shape, shard.dtype, shard.ranges)
            assert (mine.add_once, mine.tied_to) == (shard.add_once, shard.tied_to)
        assert (was.cuts, was.dispatch, was.owner_E) == (now.cuts, now.dispatch, now.owner_E)


@pytest.mark.more
def test_120b_is_one_span_a_rank(tmp_path):
    whole = lay_out(DATA / "gpt-oss-120b.json.gz", tmp_path / "120b")
    original = prepare(whole, "tp4-etp4", 4)
    check_one_span(prepare(lay_out_sharded(original, tmp_path / "out"), "auto", 4))


def test_the_plan_is_the_manifests_where_none_is_given(two):
    prepared = prepare(two, "auto", 2)
    assert prepared.plan.path == "tpx.json"
    assert prepared.text.startswith("# As the checkpoint is sharded: tp 2 x ep 2.\ntpx: 1\n")
    other = prepare(two.parent / "whole", "tp2-ep2", 2)
    assert prepared.plan.mesh == other.plan.mesh
    assert [rule.style for rule in prepared.plan.rules] == [r.style for r in other.plan.rules]


def test_the_same_cuts_by_another_name_and_dispatch_are_taken(two, tmp_path):
    assert prepare(two, "tp2-ep2", 2).plan.path == "plans/gpt_oss/tp2-ep2.yaml"
    mine = tmp_path / "mine.yaml"
    text = prepare(two, "auto", 2).plan_text()
    mine.write_text(text.replace(" expert\n", " {style: expert, dispatch: replicated}\n"))
    rules = prepare(two, mine, 2).plan.rules
    assert [rule.dispatch for rule in rules if rule.style == "expert"] == ["replicated"]


def test_every_file_of_the_folder_makes_the_digests_another(two, tmp_path):
    first = prepare(two, "auto", 2)
    write_folder(tmp_path / "other", make_config(), shards=2)
    other = prepare(tmp_path / "other", "tp2-ep2", 2)
    again = prepare(lay_out_sharded(other, tmp_path / "again"), "auto", 2)
    assert first.index.header_digest != again.index.header_digest
    assert first.digest != again.digest
    assert set(first.index.files) == {file_name(0, 2), file_name(1, 2)}


def refused(model: Path, plan: Any, world: int) -> TpxError:
    with pytest.raises(TpxError) as caught:
        prepare(model, plan, world).rank_plan(0)
    return caught.value


def test_another_world_is_refused(two):
    for plan in ("auto", "tp4"):
        error = refused(two, plan, 4)
        assert isinstance(error, PlanError)
        assert error.message == (f"`{two}` is sharded for 2 ranks (tp 2 x ep 2), and there are 4")
        assert error.hint == (
            "start 2 ranks (`tpx launch --nproc 2`), or shard the original for 4: "
            "`tpx shard --world 4`"
        )
    assert refused(two, "auto", 1).message.endswith("(tp 2 x ep 2), and there is 1")


@pytest.mark.parametrize(
    ("plan", "mesh"),
    [("tp2-etp2", "tp 2 x etp 2"), ("dp2-ep2", "dp 2 x ep 2"), ("tp4", "tp 4 x edp 4")],
)
def test_another_mesh_is_refused(two, plan, mesh):
    error = refused(two, plan, 2)
    assert isinstance(error, PlanError)
    assert error.message == (
        f"plan `plans/gpt_oss/{plan}.yaml` is for {mesh}, and `{two}` is sharded for tp 2 x ep 2"
    )
    assert error.hint == ITS_OWN


def test_another_style_is_refused(two):
    error = refused(two, "ep2", 2)
    assert isinstance(error, PlanError)
    assert error.message == (
        "plan `plans/gpt_oss/ep2.yaml` says `replicate` for `model.embed_tokens.weight`, and "
        f"`{two}` is sharded with `vocab`"
    )
    assert error.hint == ITS_OWN


def test_another_config_is_refused(two):
    config = make_config(sliding_window=16)
    (two / "config.json").write_text(json.dumps(config))
    error = refused(two, "auto", 2)
    assert isinstance(error, CheckpointError)
    assert error.message == f"`config.json` is not the one that `{two}` was sharded with"
    assert error.hint == f"put that one back, or {AGAIN}"
    (two / "config.json").write_text(json.dumps(CONFIG, indent=7, sort_keys=True))
    prepare(two, "auto", 2)  # the same values


def test_a_file_in_anothers_place_is_refused(tmp_path):
    whole = write_folder(tmp_path / "whole", ODD)
    out = lay_out_sharded(prepare(whole, "tp4-etp4", 4), tmp_path / "out")
    os.replace(out / file_name(3, 4), out / file_name(0, 4))
    error = refused(out, "auto", 4)
    assert isinstance(error, CheckpointError)
    assert error.message == f"`{file_name(0, 4)}` is not the file that `tpx.json` was written with"
    assert error.hint == f"copy the whole folder again, or {AGAIN}"


def test_a_file_that_is_missing_or_cut_short_is_refused(two):
    last = two / file_name(1, 2)
    size = last.stat().st_size
    os.truncate(last, size - 1)
    error = refused(two, "auto", 2)
    assert error.message.startswith(f"`{last.name}` is cut short")
    last.unlink()
    error = refused(two, "auto", 2)
    assert isinstance(error, CheckpointError)
    assert error.message == f"`{last.name}` is missing from folder `{two}`"


def tpx(capsys, *argv: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_commands_of_plan_take_a_sharded_checkpoint(capsys, two):
    code, out, error = tpx(capsys, "check", "auto", "--model", two)
    assert (code, error) == (0, "")
    assert out.startswith("`tpx.json` holds for 2 ranks: ")
    for command in ("show", "explain"):
        whole = json.loads(
            tpx(capsys, command, "tp2-ep2", "--model", two.parent / "whole", "--json")[1]
        )
        mine = json.loads(tpx(capsys, command, "tp2-ep2", "--model", two, "--json")[1])
        assert mine.pop("digest") != whole.pop("digest")
        assert mine == whole
        assert tpx(capsys, command, "auto", "--model", two)[0] == 0
    assert tpx(capsys, "auto", "--world", 4, "--device", "cpu", "--model", two)[0] == 0
    assert tpx(capsys, "export-hf", "tp2-ep2", "--model", two)[0] == 0
    code, _, error = tpx(capsys, "check", "tp4", "--model", two)
    assert code == 2
    assert error.startswith("error: plan `plans/gpt_oss/tp4.yaml` is for tp 4 x edp 4, and `")


def test_a_folder_without_a_manifest_is_none_of_ours(two):
    assert open_presharded(two.parent / "whole", CONFIG) is None
