"""Checkpoints that their config.json does not describe, and the shipped plans."""

from __future__ import annotations

import re

import pytest
from headers import layout_of, make_config, tensors_of, write_folder

from tpx.errors import CheckpointError, PlanError
from tpx.families import family_of
from tpx.index import CheckpointIndex
from tpx.mesh import AXES
from tpx.plan.checkpoint import OTHER
from tpx.plan.find import find_plan, read_plan, shipped_plans
from tpx.plan.load import load_plan
from tpx.plan.prepare import prepare
from tpx.plan.proofs import prove


def damaged(folder, change, **config) -> tuple[str, str | None]:
    """The refusal of a checkpoint whose tensors `change` altered."""
    made = make_config(**config)
    tensors = tensors_of(made)
    change(tensors)
    write_folder(folder, made, tensors=tensors)
    family = family_of(made)
    spec = family.spec(made)
    plan, index = read_plan("tp2-ep2", "gpt_oss"), CheckpointIndex.open(folder)
    with pytest.raises(CheckpointError) as error:
        prove(plan, spec, family.layout(spec), index, 2)
    return error.value.message, error.value.hint


ATTENTION = "model.layers.0.self_attn"
FILE = "model.safetensors"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            lambda t: t.pop(f"{ATTENTION}.sinks"),
            f"the checkpoint has no tensor `{ATTENTION}.sinks`, which config.json implies",
            f"there is `model.layers.1.self_attn.sinks`: {OTHER}",
        ),
        (
            lambda t: t.update({f"{ATTENTION}.q_norm.weight": ("BF16", (16,))}),
            f"tensor `{ATTENTION}.q_norm.weight` in `{FILE}` is in the checkpoint, and config.json "
            "implies no such parameter",
            OTHER,
        ),
        (
            lambda t: t.update(
                {f"model.layers.{n}.mlp.router.weight": ("BF16", (8, 64)) for n in (2, 3)}
            ),
            f"tensor `model.layers.2.mlp.router.weight` in `{FILE}` and 3 more like it is in the "
            "checkpoint, and config.json implies no such parameter",
            OTHER,
        ),
        (
            lambda t: t.update({f"{ATTENTION}.q_proj.weight": ("F8_E4M3", (128, 64))}),
            f"tensor `{ATTENTION}.q_proj.weight` in `{FILE}` has dtype `F8_E4M3`",
            "tpx reads it in `BF16`, `F16` or `F32`; convert the checkpoint",
        ),
        (
            lambda t: t.update({"model.norm.weight": ("BF16", (72,))}),
            f"tensor `model.norm.weight` in `{FILE}` has shape `[72]`, and config.json makes it "
            "`[64]` (from hidden_size 64)",
            OTHER,
        ),
        (
            lambda t: t.update({f"{ATTENTION}.k_proj.weight": ("BF16", (48, 64))}),
            f"tensor `{ATTENTION}.k_proj.weight` in `{FILE}` has shape `[48, 64]`, and config.json "
            "makes it `[32, 64]` (from num_key_value_heads 2)",
            OTHER,
        ),
        (
            lambda t: t.update({"lm_head.weight": ("BF16", (131,))}),
            f"tensor `lm_head.weight` in `{FILE}` has shape `[131]`, and config.json makes it "
            "`[131, 64]` (from hidden_size 64)",
            OTHER,
        ),
    ],
    ids=["missing", "unused", "more layers", "dtype", "hidden", "heads", "fewer dimensions"],
)
def test_a_checkpoint_that_config_does_not_describe(tmp_path, change, message, hint):
    assert damaged(tmp_path, change) == (message, hint)


EXPERTS = "model.layers.0.mlp.experts"


def test_experts_that_are_not_stored_as_config_says(tmp_path):
    def plain(tensors):
        for name in [n for n in tensors if n.endswith(("_blocks", "_scales"))]:
            del tensors[name]
        tensors[f"{EXPERTS}.gate_up_proj"] = ("BF16", (8, 64, 192))

    assert damaged(tmp_path / "a", plain) == (
        "`config.json` says that experts are stored in `mxfp4`, but "
        f"`{FILE}` holds tensor `{EXPERTS}.gate_up_proj`",
        "remove `quantization_config` from `config.json` if the experts are plain",
    )

    def packed(tensors):
        tensors[f"{EXPERTS}.down_proj_blocks"] = ("U8", (8, 64, 3, 16))

    assert damaged(tmp_path / "b", packed, quantization_config=None) == (
        "`config.json` has no `quantization_config`, so experts are stored plain, but "
        f"`{FILE}` holds tensor `{EXPERTS}.down_proj_blocks`",
        'add `"quantization_config": {"quant_method": "mxfp4"}` if the experts are packed',
    )


def test_a_tied_checkpoint_may_store_the_head_as_well(tmp_path):
    made = make_config(tie_word_embeddings=True)
    tensors = tensors_of(made) | {"lm_head.weight": ("BF16", (131, 64))}
    write_folder(tmp_path, made, tensors=tensors)
    family = family_of(made)
    spec = family.spec(made)
    plan = read_plan("tp2-ep2", "gpt_oss")
    assert prove(plan, spec, layout_of(made), CheckpointIndex.open(tmp_path), 2)


@pytest.mark.parametrize("name", shipped_plans("gpt_oss"))
def test_a_shipped_plan_is_named_for_what_it_cuts(name):
    plan = read_plan(name, "gpt_oss")
    said = dict(re.findall(r"(dp|tp|edp|ep|etp)([0-9]+)", name))
    cut = {rule.style for rule in plan.rules}
    sizes = {axis: getattr(plan.mesh, axis) for axis in AXES}
    assert all(sizes[axis] == int(size) for axis, size in said.items())
    # what is not named is 1, or not cut: tp with attention replicated, edp with experts whole
    assert {axis for axis, size in sizes.items() if size > 1 and axis not in said} <= {"tp", "edp"}
    if plan.mesh.world > 1:
        assert ("tp" in said) == ("colwise" in cut)
        assert bool({"ep", "etp"} & said.keys()) == ("expert" in cut)
    uneven = [rule.uneven for rule in plan.rules if rule.style == "expert"]
    assert uneven in ([], [plan.mesh.etp > 1])
    assert ("gather" in name) == any(rule.dispatch == "gather" for rule in plan.rules)


@pytest.mark.parametrize("path", shipped_plans("gpt_oss").values(), ids=lambda path: path.stem)
def test_a_shipped_plan_says_what_it_is_for_and_fits_awkward_sizes(tmp_path, path):
    lines = path.read_text().splitlines()
    assert all(line.startswith("# ") and len(line) <= 100 for line in lines[:2])
    write_folder(tmp_path, make_config(vocab_size=257, intermediate_size=224))
    assert prepare(str(tmp_path), str(path), load_plan(path).mesh.world).proofs


def test_a_plan_is_a_path_or_a_shipped_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tpx: 1\n")
    assert find_plan(str(path), "gpt_oss") == path
    assert find_plan("tp2-ep2", "gpt_oss").name == "tp2-ep2.yaml"


def test_a_plan_that_is_not_there_names_the_nearest():
    with pytest.raises(PlanError) as error:
        find_plan("tp2-ep3", "gpt_oss")
    assert error.value.message == "there is no plan `tp2-ep3` for `gpt_oss`"
    assert error.value.hint == (
        "did you mean `tp2-ep2`, `tp2-etp2` or `tp4-ep4`? (the name of a file ends in `.yaml`)"
    )
    with pytest.raises(PlanError) as error:
        find_plan("gone/tp2-ep2.yaml", "gpt_oss")
    assert error.value.message == "plan file `gone/tp2-ep2.yaml` does not exist"
