"""Kernels are noted instead of launched, and what a process compiles is what a launch then finds.

The device is a stand-in: triton compiles for an H100 and the launches are counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guards import ROOT

from tpx.kernels import compile_worker, compiling
from tpx.kernels.compiling import Failure, compile_all, noting

triton = pytest.importorskip("triton")
# a launch imports it, which fails where triton was imported for the interpreter that `driver` ends
pytest.importorskip("triton.experimental.gluon")
PACKAGE = "_unpack_of_the_hub"  # a name that no import finds, as the Hub's library gives
SOURCES = {
    folder.name: folder for folder in ROOT.glob("kernels/*/torch-ext/*") if folder.name[0] != "_"
}


class Driver:
    """Of an H100 that is not here. launched: the grids."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, ...]] = []
        loaded = (None, None, 0, 0, 1024)
        self.utils = SimpleNamespace(load_binary=lambda *_: loaded)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *given: self.launched.append(given[:3])


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 232448)
    return found


@pytest.fixture
def kernel(driver: Driver) -> Iterator[Any]:
    """A small one of ours, in a package of another name."""
    folder = SOURCES["tpx_moe"]
    job = {
        "packages": [[PACKAGE, [str(folder)]]],
        "module": f"{PACKAGE}.pack_kernels",
        "file": str(folder / "pack_kernels.py"),
        "kernel": "pack_kernel",
    }
    yield compile_worker.kernel_of(job)
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def launch(kernel: Any, tile: int = 64) -> None:
    blocks, packed = torch.zeros(2, 4096, dtype=torch.uint8)
    code = vars(sys.modules[kernel.fn.__module__])["CODE"]
    kernel[(2, 1)](
        blocks, packed, 64, 64, 1, 2048, PAIRS=True, PLACES=code, TILE=tile, PARTS=4, WORDS=16,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


class Compiles(Exception):
    """This process, in which the interpreter may have left its marks, would compile."""


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each kernel that this process asked for was on disk; Compiles where it was not."""
    found = list[bool]()

    def compiles(*_: object) -> None:
        raise Compiles

    monkeypatch.setattr(triton.compiler.ASTSource, "make_ir", compiles)
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit)
    )
    return found


def test_a_noted_launch_neither_compiles_nor_runs(driver, kernel, hits):
    with noting() as noted, ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            launch(kernel)
        for done in [pool.submit(launch, kernel, tile) for tile in (64, 128, 128)]:
            done.result()
    assert [json.loads(job)["kernel"] for job in noted.jobs] == ["pack_kernel"] * 2
    assert (len(set(noted.jobs)), noted.skipped) == (2, 5)
    assert driver.launched == hits == []
    assert not any(kernels for kernels, *_ in kernel.device_caches.values())
    assert triton.knobs.runtime.jit_cache_hook is None


def test_a_launch_finds_what_a_process_compiled(driver, kernel, hits):
    with noting() as noted:
        launch(kernel)
    failures = compile_all(noted.jobs)
    assert all("but for its launcher" in failure.error for failure in failures)  # no libcuda here
    launch(kernel)
    assert (hits, driver.launched) == ([True], [(2, 1, 1)])
    with pytest.raises(Compiles):
        launch(kernel, 128)  # no one has compiled it
    with noting() as noted:
        launch(kernel)  # known to this process: it is launched as ever
    assert (noted.jobs, len(driver.launched)) == ([], 2)


def test_a_version_of_triton_that_tells_something_else_launches_as_ever(driver, kernel, hits):
    with noting() as noted:
        assert noted.hook(fn=SimpleNamespace(jit_function=None), compile={}) is False
    assert (noted.jobs, noted.skipped) == ([], 0)


def ask(jobs: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-P", str(compiling.WORKER)]
    told = "".join(f"{job}\n" for job in jobs)
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_process_imports_no_torch_and_outlives_what_does_not_compile(driver, kernel):
    with noting() as noted:
        launch(kernel)
        launch(kernel, 48)  # no power of two
    right, wrong = (json.loads(job) | {"launcher": False} for job in noted.jobs)
    lost = right | {"kernel": "gone"}
    answers = ask([json.dumps(job) for job in (wrong, lost, right)])
    assert "CompilationError" in answers[0]["error"]
    assert answers[1]["error"] == (
        f"AttributeError: module '{PACKAGE}.pack_kernels' has no attribute 'gone'"
    )
    assert answers[2]["error"] == ""
    assert not any(answer["torch"] for answer in answers)


def test_no_source_of_a_kernel_imports_torch():
    jobs = [
        {"packages": [[name, [str(folder)]]], "module": f"{name}.{path.stem}", "file": str(path)}
        for name, folder in SOURCES.items()
        for path in folder.glob("*_kernels.py")
    ]
    code = (
        "import json, sys; sys.path.append(sys.argv[1]); import compile_worker\n"
        "for job in json.loads(sys.argv[2]): compile_worker.kernel_of(job | {'kernel': 'triton'})\n"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(compiling.WORKER.parent), json.dumps(jobs)]
    assert len(jobs) >= 8
    assert subprocess.run(command, check=False).returncode == 0


def job(name: str, size: int = 1, **kinds: str) -> str:
    return json.dumps({"kernel": name, "size": size, "data": json.dumps({"signature": kinds})})


def worker(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """One that runs `line` for each job."""
    path = folder / "worker.py"
    path.write_text(f"import json, os, sys\nfor job in map(json.loads, sys.stdin):\n    {line}\n")
    monkeypatch.setattr(compiling, "WORKER", path)


def names(failures: list[Failure]) -> list[tuple[str, str]]:
    return [(json.loads(failure.job)["kernel"], failure.error) for failure in failures]


def test_what_failed_is_told_and_the_rest_is_compiled(tmp_path, monkeypatch):
    reply = "print(json.dumps({'error': 'no' if job['kernel'] == 'b' else ''}), flush=True)"
    worker(tmp_path, monkeypatch, reply)
    assert names(compile_all([job(name) for name in "abcd"])) == [("b", "no")]
    assert compile_all([]) == []


def test_a_process_that_dies_takes_one_job_with_it(tmp_path, monkeypatch):
    reply = "os._exit(3) if job['kernel'] == 'a' else print('{\"error\": \"\"}', flush=True)"
    worker(tmp_path, monkeypatch, reply)
    died = ("a", "the process died with exit code 3")
    found = names(compile_all([job("a", 2), job("b")], most=1))
    assert found == [died, ("b", "no process is left to compile it")]
    monkeypatch.setattr(compiling.os, "sched_getaffinity", lambda _: range(2))
    assert names(compile_all([job("a", 2), *map(job, "bcd")])) == [died]


def test_a_python_that_is_not_there_costs_the_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling.sys, "executable", str(tmp_path / "none"))
    assert names(compile_all([job("a")])) == [("a", "no process is left to compile it")]


def test_each_is_compiled_once_the_longest_first_and_one_launcher_a_signature():
    jobs = [job("a", 1, x="i32"), job("b", 3, x="i32"), job("a", 1, x="i32"), job("b", 2, x="i64")]
    jobs.append(job("b", 1, x="i32"))
    told = [json.loads(one) for one in compiling._ordered(jobs)]
    assert [(one["kernel"], one["size"], one["launcher"]) for one in told] == [
        ("b", 3, True), ("b", 2, True), ("a", 1, True), ("b", 1, False),
    ]  # fmt: skip


def test_a_module_that_fails_is_not_left_half_imported(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    broken = {"packages": [], "module": "broken", "file": str(tmp_path / "broken.py")}
    with pytest.raises(ZeroDivisionError):
        compile_worker.kernel_of(broken | {"kernel": "k"})
    assert "broken" not in sys.modules


@pytest.mark.more
def test_trials_launch_the_fast_unpacking_and_no_norm_before_a_dense_layer(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    folders = [ROOT, *(folder.parent for folder in SOURCES.values())]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, folders)))
    command = [sys.executable, str(Path(__file__).with_name("note_trials.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    gemms = [kernel for kernel in found if kernel["kernel"] == "expert_gemm"]
    assert len(gemms) > 10
    assert all(kernel["ASM"] for kernel in gemms)
    assert not any(kernel.get("HAS_NORM") for kernel in found)
    names = {kernel["kernel"] for kernel in found}
    assert names >= {"decode", "prefill", "gemv", "skinny", "draw", "pack_kernel", "sort_kernel"}
    assert "rms_norm" not in names
