"""`tpx plan diff`: bytes to move, against the ranges of the ranks' shards, element by element."""

from __future__ import annotations

import itertools
import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from headers import make_config, write_folder

from tpx.cli.main import main
from tpx.families.layout import Range
from tpx.index import DTYPE_BITS
from tpx.plan.diff import diff
from tpx.plan.find import plans_for_world, shipped_plans
from tpx.plan.prepare import Prepared, prepare

PAIRS = [
    pair
    for world in (2, 4)
    for pair in itertools.permutations(plans_for_world("gpt_oss", world), 2)
]


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("diff"), make_config(num_hidden_layers=1))


@pytest.fixture(scope="module")
def prepared(folder):
    return {
        name: prepare(folder, name, world)
        for world in (1, 2, 4)
        for name in plans_for_world("gpt_oss", world)
    }


def tpx(capsys, *argv) -> tuple[int, str, str]:
    code = main(["plan", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def held(ranges: tuple[tuple[Range, ...], ...], shape: tuple[int, ...]) -> list[np.ndarray]:
    """Of each dimension, which indices a rank holds."""
    masks = [np.zeros(size, dtype=bool) for size in shape]
    for mask, parts in zip(masks, ranges, strict=True):
        for start, stop in parts:
            mask[start:stop] = True
    return masks


def to_read(before: Prepared, after: Prepared, rank: int) -> int:
    """Elements that the rank of `after` holds and that of `before` does not, in bytes."""
    total = 0
    plans = before.rank_plan(rank), after.rank_plan(rank)
    for name, shard in plans[1].shards.items():
        shape = before.layout.parameters[name].shape
        old, new = (held(plan.shards[name].ranges, shape) for plan in plans)
        both = prod(int((a & b).sum()) for a, b in zip(old, new, strict=True))
        mine = prod(int(mask.sum()) for mask in new)
        total += (mine - both) * DTYPE_BITS[shard.dtype] // 8
    return total


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_bytes_to_move_are_those_of_the_shards(prepared, first, second):
    before, after = prepared[first], prepared[second]
    found = diff(before, after)
    world = before.world
    assert found.rank_moved == tuple(to_read(before, after, rank) for rank in range(world))
    assert sum(row.moved for row in found.moved) == sum(found.rank_moved)


@pytest.mark.parametrize("name", shipped_plans("gpt_oss"))
def test_from_a_plan_to_itself_nothing_moves(prepared, name):
    found = diff(prepared[name], prepared[name])
    assert sum(found.rank_moved) == 0
    assert found.before == found.after
    assert {change.kind for change in found.changes} <= {"unchanged"}


def test_collectives_are_added_removed_and_changed(prepared):
    found = diff(prepared["dp2-ep2"], prepared["dp2-ep2-gather"])
    kinds = {c.name: c.kind for c in found.changes if c.phase == "decode"}
    assert kinds["moe.tokens"] == "removed"
    assert kinds["moe.scatter"] == "added"
    found = diff(prepared["tp2-ep2"], prepared["tp4-ep4"])
    kinds = {c.name: c.kind for c in found.changes if c.phase == "prefill"}
    assert kinds == dict.fromkeys(("embed", "attention", "moe.combine", "head"), "changed")


SHOWN = """\
from  plans/gpt_oss/tp2-ep2.yaml
      2 ranks: tp 2 x ep 2
to    plans/gpt_oss/ep2.yaml
      2 ranks: tp 2 x ep 2

bytes on the fullest rank                      before      after     to read
  model.embed_tokens                          8.45 kB   16.77 kB     8.45 kB
"""
ENDING = """\
collectives  prefill and decode: 3 of 4 differ
  removed  embed
           before all_reduce over tp of 2, 128 bytes a token, once
  removed  attention
           before all_reduce over tp of 2, 128 bytes a token, each layer
  removed  head
           before all_gather over tp of 2, 132 bytes a row of logits, once
"""


def test_it_is_drawn_on_80_columns(capsys, folder):
    code, out, _ = tpx(capsys, "diff", "tp2-ep2", "ep2", "--model", folder)
    assert code == 0
    assert out.startswith(SHOWN)
    assert out.endswith(ENDING)
    assert max(map(len, out.splitlines())) <= 80


def test_plans_for_other_worlds_are_compared_on_totals(capsys, folder):
    code, out, _ = tpx(capsys, "diff", "tp2", "dp2-tp2-ep4", "--model", folder)
    assert code == 0
    assert "\nThe plans are for 2 and 4 ranks, so only totals are compared.\n" in out
    assert "to read" not in out
    found = json.loads(tpx(capsys, "diff", "tp2", "dp2-tp2-ep4", "--model", folder, "--json")[1])
    assert (found["same_world"], found["modules"], found["rank_moved"]) == (False, [], [])
    assert (found["before"]["world"], found["after"]["world"]) == (2, 4)


def test_auto_takes_the_other_plans_world(capsys, folder):
    code, out, _ = tpx(capsys, "diff", "tp4", "auto", "--model", folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["before"]["world"], found["after"]["world"]) == (4, 4)
    assert len(found["rank_moved"]) == 4
    assert sum(row["moved"] for row in found["modules"]) == sum(found["rank_moved"])


def test_a_file_and_a_world_that_does_not_fit(capsys, folder, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(shipped_plans("gpt_oss")["tp2-ep2"].read_text())
    code, out, _ = tpx(capsys, "diff", "tp2-ep2", path, "--model", folder)
    assert code == 0
    assert "collectives  prefill and decode: the same\n" in out
    code, out, err = tpx(capsys, "diff", "tp2-ep2", path, "--model", folder, "--world", 4)
    assert (code, out) == (2, "")
    assert "is for 2 ranks (tp 2 x ep 2), and there are 4\n" in err
