"""What trials and steps launch is compiled before them: once a node, and not again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from make_checkpoint import gpt_oss_config, make_checkpoint
from ranks import ranks
from tiny import SIZES

from tpx.comm import Groups
from tpx.engine import typical
from tpx.engine.cache import CacheShape
from tpx.engine.runner import shape_of
from tpx.engine.scheduler import Limits
from tpx.engine.typical import Typical, compile_steps
from tpx.kernels import Choice, Device, Kernels, read_wanted
from tpx.kernels.compiling import Noted
from tpx.kernels.loaded import Loaded
from tpx.kernels.local import find_local, import_local
from tpx.kernels.operations import OPERATIONS
from tpx.mesh import Mesh
from tpx.models import ahead
from tpx.models.load import load_model
from tpx.models.proof import ExpertShapes, Shapes, compile_trials, prove
from tpx.plan.prepare import prepare

CPU = torch.device("cpu")
EXPERTS = ExpertShapes(32, 64, torch.float32, 2, 8, 4)
SHAPES = Shapes(((8, 4),), 4, 2, 8, 16, 20, torch.float32, EXPERTS)


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A CPU that kernels are compiled for: the lists of jobs."""
    compiled = list[list[str]]()
    for module in (ahead, typical):
        monkeypatch.setattr(module, "compiles", lambda device: True)
    monkeypatch.setattr(ahead, "compile_all", lambda jobs: compiled.append(jobs) or [])
    monkeypatch.setattr("tpx.models.verdicts.cache_folder", lambda: tmp_path / "verdicts")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return compiled


def notes(*jobs: str) -> Callable[[Noted], None]:
    return lambda noted: noted.jobs.extend(jobs)


def on_two(lacking: list[list[str]]) -> tuple[list[list[str]], int]:
    """What this rank compiled, and how often all waited for it. lacking: jobs of each rank."""
    compiled = list[list[str]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "compiles", lambda device: True)
        patch.setattr(ahead, "compile_all", lambda jobs: compiled.append(jobs) or [])
        groups = Groups(Mesh(tp=2, edp=2), torch.distributed.get_rank(), CPU, local_world=2)
        mine = lacking[groups.rank]
        with groups.recording() as records:
            ahead.compile_launched(notes(*mine) if mine else None, CPU, groups["node"])
        groups.close()
    return compiled, sum(record.name == "kernels.compiled" for record in records)


@pytest.mark.parametrize(("lacking", "compiled"), [
    ([["a", "b"], ["b", "c"]], [["a", "b", "c"]]), ([[], ["b"]], [["b"]]), ([[], []], []),
])  # fmt: skip
def test_the_first_rank_of_a_node_compiles_what_all_of_them_launch(lacking, compiled):
    (first, waited), second = ranks(2).run(on_two, lacking)
    assert first == compiled
    assert second == ([], len(compiled))
    assert waited == len(compiled)


def test_where_no_kernel_runs_nothing_is_noted(monkeypatch):
    monkeypatch.undo()
    assert not ahead.compiles(CPU)
    assert ahead.compile_launched(lambda _: pytest.fail("noted"), CPU, Groups.alone(CPU).none) == []


class Package(ModuleType):
    """Kernels with a self_test, which notes what it was asked."""

    BOUND = 1e-2

    def __init__(self, folder: Path):
        super().__init__("package")
        folder.mkdir()
        self.__file__ = str(folder / "__init__.py")
        self.asked = list[tuple[Any, ...]]()

    def self_test(self, *given: Any, judge: bool = True) -> Any:
        self.asked.append((*given, judge))
        return {"decode_attention": 0.0} if judge else {}


class Foreign(Package):
    """One of another publisher, which always looks at what came out."""

    def self_test(self, *given: Any) -> Any:
        self.asked.append(given)
        return {}


def loaded(package: ModuleType, *operations: str) -> Loaded:
    choices = [Choice(name, "local", "package", "1", "/k", "the default") for name in operations]
    kernels = Kernels(read_wanted(True), Device("cuda"), tuple(choices))
    return Loaded(kernels, dict.fromkeys(operations, package))


def test_what_trials_launch_is_noted_until_their_verdict_is_known(tmp_path):
    package, node = Package(tmp_path / "package"), Groups.alone(CPU)["node"]
    kernels = loaded(package, "attention", "linear")
    for _ in range(2):
        compile_trials(kernels, CPU, SHAPES, node)
    asked = (CPU, ((8, 4),), 4, 2, 8, 16, 20, torch.float32)
    assert package.asked == [(*asked, False)] * 2  # of both operations at once
    prove(kernels, CPU, SHAPES)
    compile_trials(kernels, CPU, SHAPES, node)
    assert package.asked[2:] == [(*asked, True)]
    experts = Package(tmp_path / "experts")
    compile_trials(loaded(experts, "experts"), CPU, SHAPES, node)
    assert experts.asked == [(CPU, *EXPERTS, False)]


def test_a_foreign_trial_is_not_run_twice(tmp_path):
    package = Foreign(tmp_path / "package")
    compile_trials(loaded(package, "attention"), CPU, SHAPES, Groups.alone(CPU)["node"])
    assert package.asked == []


def test_what_was_not_launched_gave_zeros():
    """Whoever uses it as an index would else read anywhere."""
    noted, library = Noted(), torch.library.Library("tpx_ahead_test", "DEF")
    library.define("seven(Tensor x, bool launches) -> (Tensor, Tensor)")

    def seven(x: torch.Tensor, launches: bool) -> tuple[torch.Tensor, torch.Tensor]:
        noted.skipped += not launches
        return torch.full_like(x, 7), torch.full_like(x, 8)

    library.impl("seven", seven, "CompositeExplicitAutograd")
    x = torch.ones(2)
    with torch.inference_mode(), ahead.Blank(noted):
        told = [torch.ops.tpx_ahead_test.seven(x, launches) for launches in (True, False)]
        again = told[0][0] + x
    assert [[y.tolist() for y in pair] for pair in told] == [[[7, 7], [8, 8]], [[0, 0], [0, 0]]]
    assert (again.tolist(), x.tolist()) == ([8, 8], [1, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """On our kernels, whose references run here."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", gpt_oss_config(**SIZES))
    prepared = prepare(str(folder), "tp1", 1)
    kernels = {}
    for name, operation in OPERATIONS.items():
        found = find_local(operation.package)
        assert found is not None
        kernels[name] = import_local(operation.package, found)
    plan = prepared.rank_plan(0)
    loaded, _ = load_model(prepared, plan, Groups.alone(CPU), torch.float32, CPU, kernels=kernels)
    calls = list[int]()
    loaded.register_forward_pre_hook(lambda module, given: calls.append(len(given[0].ids_T)))
    return SimpleNamespace(module=loaded, kernels=kernels, spec=prepared.spec, calls=calls)


def steps(model: Any, limits: Limits, static: bool = True, **kernels: Any) -> list[int]:
    """Tokens of each step whose launches were noted, as a new process would."""
    del model.calls[:]
    shape, groups = CacheShape(model.spec, 2, torch.float32), Groups.alone(CPU)
    given = Typical(limits, 90, static), groups, CPU, model.kernels | kernels
    compile_steps(model.module, shape, *given, "local")
    return list(model.calls)


@pytest.mark.parametrize("static", [True, False])
def test_the_steps_of_usual_traffic_are_noted_once(model, static, tmp_path):
    limits = Limits(24, 3)
    found = steps(model, limits, static)
    assert found[:10] == [1, 2, 3, 4, 7, 8, 13, 16, 24, *found[9:10]]
    assert steps(model, limits, static) == []
    assert steps(model, Limits(24, 2), static)
    [*marks] = (tmp_path / "cache").iterdir()
    assert len(marks) == 2
    for mark in marks:
        mark.unlink()  # with the kernels that lay beside it
    assert steps(model, limits, static) == found


def test_kernels_that_may_look_at_what_they_wrote_are_left_alone(model):
    assert steps(model, Limits(8, 2), linear=ModuleType("them")) == []


def test_each_way_of_a_table_and_each_kind_of_number_has_a_step():
    assert typical.token_counts(100) == [1, 2, 3, 4, 7, 8, 13, 16, 25, 32, 49, 64, 100]
    assert typical.sequence_counts(40) == [2, 4, 8, 16, 17, 40]
    assert typical.sequence_counts(1) == []
    assert typical.static_shapes(5, 4096) == [
        (rows, pages) for rows in (1, 2, 4, 8) for pages in (64, 128, 256)
    ]
    assert typical.static_shapes(256, 131072)[-2:] == [(224, 64), (256, 64)]
    request = typical.chunk(4096, 1).request
    assert shape_of([request] * 5)[:2] == (8, 256)  # as the runner asks for it
