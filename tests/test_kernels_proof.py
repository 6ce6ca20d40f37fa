"""A kernel that is wrong on the device at hand does not run, and that is said."""

from __future__ import annotations

import logging
from types import ModuleType

import pytest
import torch

from tpx.kernels import Choice, Device, Kernels, read_wanted
from tpx.kernels.loaded import Loaded
from tpx.models.proof import Shapes, prove

CPU = torch.device("cpu")
SHAPES = Shapes(((8, 4),), 4, 2, 8, 16, 20, 32, 64, torch.float32)
NAN = float("nan")
RIGHT = {"linear_decode 8x4": 1e-3, "decode_attention": 2e-3, "prefill_attention": 0.0}


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
