"""Recipes: every shipped one is dry-run, and its output is the one that was kept; and the errors of
a file that is wrong.

`python tests/test_recipes.py` writes the kept outputs anew.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from guards import ROOT

from tpx.cli.flags import parse
from tpx.cli.main import main
from tpx.errors import PlanError, TpxError
from tpx.launch import checks, preflight as module
from tpx.launch.preflight import preflight
from tpx.launch.recipe import find_recipe, shipped_recipes
from tpx.launch.recipe_file import Verified, read_recipe
from tpx.launch.room import Room

KEPT = ROOT / "tests" / "data" / "recipes"
HUB = {"openai/gpt-oss-20b": "gpt-oss-20b", "openai/gpt-oss-120b": "gpt-oss-120b"}
DEMO = "examples/models/tpx-demo"
NAMES = sorted(shipped_recipes())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("hub"))


def write_hub(folder: Path) -> Path:
    """The headers of the published checkpoints, and the demo, each where its recipe names it."""
    from checkpoint_files import lay_out

    for hub_id, name in HUB.items():
        lay_out(ROOT / "tests" / "data" / f"{name}.json.gz", folder / hub_id)
    (folder / DEMO).parent.mkdir(parents=True)
    (folder / DEMO).symlink_to(ROOT / DEMO)
    return folder


@pytest.fixture
def anywhere(hub, monkeypatch):
    """A machine of which every check says the same."""
    settle(monkeypatch, hub)


def settle(monkeypatch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, "count_gpus", lambda environ: 0)
    monkeypatch.setattr(checks, "memory_room", lambda: Room(10**11, "this machine"))
    monkeypatch.setattr(checks, "open_files", lambda: 4096)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def kept(name: str) -> Path:
    return KEPT / f"{name.replace('/', '-')}.txt"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_would_start_as_it_did_before(anywhere, capsys, name):
    from dry_runs import dry_run

    code, text = dry_run(capsys, name)
    assert (code, text) == (0, kept(name).read_text())


def test_every_kept_output_has_a_recipe():
    assert {path.name for path in KEPT.iterdir()} == {kept(name).name for name in NAMES}


def test_a_recipe_says_by_whom_it_was_run():
    for name in NAMES:
        found = find_recipe(name)
        assert found.verified is None or all(found.verified), name
        assert name.rpartition("/")[2].startswith(found.device), name
        assert name.endswith(f"x{found.ranks}"), name
        assert found.ranks // found.nodes <= 8, name


def test_what_is_typed_wins_over_the_recipe_wherever_it_stands():
    for words in (["--model", "mine", "fam/x"], ["fam/x", "--model", "mine"]):
        words[words.index("fam/x")] = NAMES[1]
        found = parse(words)
        recipe = find_recipe(NAMES[1])
        assert (found.model, found.tp_plan, found.nproc) == ("mine", recipe.plan, "1")
        assert (found.recipe, found.hardware, found.target) == (NAMES[1], recipe.device, None)


def test_a_script_may_follow_a_recipe():
    found = parse([NAMES[1], "--seed", "1", "train.py", NAMES[1], "--lr", "2"])
    assert (found.recipe, found.target, found.args) == (
        NAMES[1], "train.py", (NAMES[1], "--lr", "2")
    )  # fmt: skip


def test_a_file_of_that_name_is_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / NAMES[1]
    script.parent.mkdir(parents=True)
    script.write_text("")
    assert parse([NAMES[1]]).target == NAMES[1]


def test_a_recipes_variables_give_way_to_those_that_are_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    options = parse(["--device", "cpu", "train.py"])
    from dataclasses import replace

    options = replace(options, environment=(("NCCL_DEBUG", "WARN"), ("OTHER", "1")), dry_run=True)
    found = preflight(options, {"NCCL_DEBUG": "INFO"}).environment
    assert ("NCCL_DEBUG" in found, found["OTHER"]) == (False, "1")


def test_a_gpu_that_is_missing_is_the_recipes(anywhere, capsys):
    name = next(name for name in NAMES if name.endswith("h100x2"))
    assert main(["launch", name]) == 3
    assert capsys.readouterr().err == (
        f"error: recipe `{name}` needs a GPU, and none is visible\n\nhint: use `--device cpu`\n"
    )


def test_a_recipe_that_does_not_exist(capsys):
    name = next(name for name in NAMES if name.endswith("h100x2"))
    assert main(["launch", name.replace("h100x2", "h100x22")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: there is no recipe `{name}2`\n\nhint: did you mean `{name}`"
    )


GOOD = """
tpx: 1
model: some/model
plan: tp2
device: h100
nodes: 2
ranks: 16
options: {kernels: local, chat: true}
environment: {NCCL_DEBUG: WARN}
verified: {date: 2026-11-24, versions: torch 2.13.0, figure: 10 tokens a second}
"""


def test_a_recipe_is_read_whole():
    found = read_recipe(GOOD.encode(), "x/y")
    assert found[1:6] == ("some/model", "tp2", "h100", 2, 16)
    assert found.flags() == {"model": "some/model", "tp-plan": "tp2", "nnodes": "2", "nproc": "8",
                             "kernels": "local", "chat": "true"}  # fmt: skip
    assert found.environment == {"NCCL_DEBUG": "WARN"}
    assert found.verified == Verified("2026-11-24", "torch 2.13.0", "10 tokens a second")


def test_options_are_read_as_the_flags_that_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tpx.cli.flags.find_recipe", lambda name: read_recipe(GOOD.encode(), name))
    found = parse(["x/y"])
    assert (found.kernels, found.chat, found.nnodes, found.nproc) == ("local", True, "2", "8")
    assert found.environment == (("NCCL_DEBUG", "WARN"),)
    wrong = GOOD.replace("kernels: local", "krenels: local")
    monkeypatch.setattr("tpx.cli.flags.find_recipe", lambda name: read_recipe(wrong.encode(), name))
    with pytest.raises(PlanError) as raised:
        parse(["x/y"])
    assert raised.value.message == "recipe `x/y`: `tpx launch` has no flag `--krenels`"
    assert raised.value.hint == "did you mean `--kernels`?"


@pytest.mark.parametrize(("found", "instead", "message", "hint"), [
    ("plan: tp2", "paln: tp2", "recipe `x/y`, line 4: unknown key `paln`", "did you mean `plan`?"),
    ("plan: tp2\n", "", "recipe `x/y` has no `plan`", "see the recipes in `launch/`"),
    ("plan: tp2", "plan: [tp2]", "recipe `x/y`, line 4: `plan` is something else, not a word",
     None),
    ("device: h100", "device: h10", "recipe `x/y`, line 5: `device` is `h10`, not a device that "
     "is known", "did you mean `h100`?"),
    ("ranks: 16", "ranks: 15", "recipe `x/y`, line 7: `ranks` is `15`, not a multiple of `nodes`, "
     "2", None),
    ("ranks: 16", "ranks: 0", "recipe `x/y`, line 7: `ranks` is `0`, not a whole number from 1 up",
     None),
    ("tpx: 1", "tpx: 2", "recipe `x/y`, line 2: `tpx` is `2`, not version `1`, the only one there "
     "is", None),
    ("figure: 10 tokens a second", "who: me", "recipe `x/y`, line 10: unknown key `who`",
     "use `date`, `versions` or `figure`"),
    (", figure: 10 tokens a second", "", "recipe `x/y`, line 10: `verified` is something else, not "
     "with a `figure`", "write `null` until it was run"),
    ("{NCCL_DEBUG: WARN}", "x", "recipe `x/y`, line 9: `environment` is `x`, not a mapping", None),
    ("model: some/model", "model: &a x", "recipe `x/y`, line 3: an anchor, `&a`, which recipes do "
     "not have", "write the value out"),
    ("plan: tp2", "tpx: 1", "recipe `x/y`, line 4: key `tpx` is already on line 2",
     "delete one of the two"),
])  # fmt: skip
def test_mistakes_in_a_recipe_have_a_line(found, instead, message, hint):
    assert found in GOOD
    with pytest.raises(TpxError) as raised:
        read_recipe(GOOD.replace(found, instead).encode(), "x/y")
    assert (raised.value.message, raised.value.hint) == (message, hint)


def write_kept() -> None:
    import contextlib
    import io

    sys.path.insert(0, str(ROOT / "scripts"))
    from dry_runs import stable

    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        settle(patch, write_hub(Path(os.path.realpath(folder))))
        for name in NAMES:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert main(["launch", "--dry-run", name]) == 0, name
            kept(name).write_text(stable(out.getvalue()))


if __name__ == "__main__":
    write_kept()
