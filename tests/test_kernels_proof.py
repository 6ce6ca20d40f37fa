"""A kernel that is wrong on the device at hand does not run, and that is said."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ranks import ranks

from tpx.comm import Groups
from tpx.kernels import Choice, Device, Kernels, read_wanted
from tpx.kernels.loaded import Loaded
from tpx.mesh import Mesh
from tpx.models.proof import ExpertShapes, Shapes, agreed, prove
from tpx.moe.packed import KNOWN, unpacks_safely

CPU = torch.device("cpu")
EXPERTS = ExpertShapes(32, 64, torch.float32, 2, 8, 4)
SHAPES = Shapes(((8, 4),), 4, 2, 8, 16, 20, torch.float32, EXPERTS)
NAN = float("nan")
RIGHT = {"linear_decode 8x4": 1e-3, "decode_attention": 2e-3, "prefill_attention": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("tpx.models.verdicts.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def loaded(errors: dict[str, float]) -> Loaded:
    """One package for three operations, and one without a test."""
    given = list[tuple[object, ...]]()

    def self_test(*arguments: object) -> dict[str, float]:
        given.append(arguments)
        return errors

    package = ModuleType("package")
    vars(package).update(self_test=self_test, BOUND=1e-2, given=given)
    names = ("attention", "linear", "sample")
    choices = [Choice(name, "local", "tpx_attention", "1", "/k", "the default") for name in names]
    choices.append(Choice("route", "hub", "them/route", "2", "/h", "as asked"))
    modules = dict.fromkeys(names, package) | {"route": ModuleType("them")}
    return Loaded(Kernels(read_wanted(True), Device("cuda"), tuple(choices)), modules)


def test_kernels_within_their_bound_run(caplog):
    before = loaded(RIGHT | {"sample": 0.0})
    assert prove(before, CPU, SHAPES) == before
    given = (CPU, ((8, 4),), 4, 2, 8, 16, 20, torch.float32)
    assert before.modules["linear"].given == [given]  # once for all three
    assert not caplog.records


@pytest.mark.parametrize(("name", "operation"), [
    ("linear_decode 8x4", "linear"), ("decode_attention", "attention"),
    ("prefill_attention", "attention"), ("rope_write_attention", "attention"), ("sample", "sample"),
])  # fmt: skip
@pytest.mark.parametrize(("error", "shown"), [(0.125, "0.12"), (NAN, "inf")])
def test_one_that_is_wrong_is_left_out(caplog, name, operation, error, shown):
    before = loaded(RIGHT | {name: error})
    with caplog.at_level(logging.WARNING, "tpx"):
        after = prove(before, CPU, SHAPES)
    assert before.modules.keys() - after.modules.keys() == {operation}
    off = {choice.operation: choice for choice in after.chosen.choices if choice.source == "off"}
    reason = f"tpx_attention 1 is off by {shown} on this GPU, at most 0.01"
    assert off == {operation: Choice(operation, "off", "", "", "", reason)}
    assert [record.message for record in caplog.records] == [
        f"kernels for {operation}: off, {reason}"
    ]


def test_a_worse_error_after_nan_does_not_hide_it():
    after = prove(loaded({"decode_attention": NAN, "prefill_attention": 0.0}), CPU, SHAPES)
    assert "attention" not in after.modules


def package(folder: Path, safe: bool) -> ModuleType:
    """Of experts, which counts its trials."""
    module = ModuleType("experts")
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("one")
    trials = list[tuple[object, ...]]()

    def self_test(*given: object) -> SimpleNamespace:
        trials.append(given)
        return SimpleNamespace(safe=safe)

    vars(module).update(__file__=str(folder / "__init__.py"), self_test=self_test, trials=trials)
    return module


def try_experts(module: ModuleType, shapes: Shapes = SHAPES) -> bool:
    """As a new process would."""
    choice = Choice("experts", "local", "tpx_moe", "1", "/k", "the default")
    kernels = Kernels(read_wanted(True), Device("cuda"), (choice,))
    prove(Loaded(kernels, {"experts": module}), CPU, shapes)
    key = module, CPU, *shapes.experts[:3]
    assert unpacks_safely(*key) is KNOWN[key]
    return KNOWN.pop(key)


@pytest.mark.parametrize("safe", [True, False])
def test_what_a_trial_found_is_kept(tmp_path, safe):
    module = package(tmp_path / "package", safe)
    assert [try_experts(module) for _ in range(3)] == [safe] * 3
    assert module.trials == [(CPU, *EXPERTS)]
    try_experts(module, SHAPES._replace(experts=EXPERTS._replace(units=96)))
    (tmp_path / "package" / "tiles.json").write_text("{}")
    try_experts(module)
    assert len(module.trials) == 3  # other sizes, and other files of the package


def test_a_record_that_is_damaged_or_cannot_be_written_costs_a_trial(tmp_path, cache):
    module = package(tmp_path / "package", False)
    try_experts(module)
    [record] = cache.iterdir()
    record.write_text("{")
    try_experts(module)
    try_experts(module)
    assert len(module.trials) == 2
    record.unlink()
    cache.rmdir()
    cache.write_text("no folder")
    assert [try_experts(module) for _ in range(2)] == [False, False]
    assert len(module.trials) == 4


def test_errors_are_kept_too(tmp_path):
    before = loaded(RIGHT | {"sample": NAN})
    (tmp_path / "package").mkdir()
    vars(before.modules["linear"])["__file__"] = str(tmp_path / "package" / "__init__.py")
    for _ in range(2):
        assert "sample" not in prove(before, CPU, SHAPES).modules
    assert len(before.modules["linear"].given) == 1


def test_ranks_do_without_what_one_of_them_does_without():
    found = ranks(2).run(proved)
    off = (
        ("off", "rank 1 does without"),
        ("off", "tpx_attention 1 is off by 0.12 on this GPU, at most 0.01"),
    )
    for rank in (0, 1):
        assert found[rank] == {
            "attention": ("local", "the default"),
            "linear": off[rank],
            "sample": ("local", "the default"),
            "route": ("hub", "as asked"),
        }


def proved() -> dict[str, tuple[str, str]]:
    """What this rank uses and why, where the second one's `linear` is wrong."""
    rank = torch.distributed.get_rank()
    before = loaded(RIGHT | {"linear_decode 8x4": 0.125 if rank else 1e-3})
    world = Groups(Mesh(tp=2, edp=2), rank, CPU)["world"]
    found = agreed(prove(before, CPU, SHAPES), world)
    assert [*found.modules] == ["attention", "sample", "route"]
    return {c.operation: (c.source, c.reason) for c in found.chosen.choices}
