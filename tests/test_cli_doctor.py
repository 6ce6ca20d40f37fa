"""`tpx doctor`: what it prints, and when it says that something is wrong."""

from __future__ import annotations

import platform

import pytest

from tpx.cli import doctor
from tpx.cli.main import main
from tpx.kernels import installed
from tpx.launch import kernels_here
from tpx.launch.devices import Gpu
from tpx.version import __version__

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0))
LOST = "the reference operations run, which are slow on a GPU"
OFF = f"kernels: off, they need a GPU; {LOST}"


@pytest.fixture
def machine(monkeypatch):
    """Sets what is installed and which GPU there is."""

    def has(versions: dict[str, str], gpu: Gpu | None = None, cuda: str | None = None) -> None:
        monkeypatch.setattr(installed, "installed", versions.get)
        monkeypatch.setattr(doctor, "installed", versions.get)
        for module in (doctor, kernels_here):
            monkeypatch.setattr(module, "count_gpus", lambda environ=None: int(gpu is not None))
            monkeypatch.setattr(module, "smallest_gpu", lambda: gpu)
            monkeypatch.setattr(module, "torch_cuda", lambda: cuda)
        monkeypatch.setattr(doctor, "machine_lines", lambda has_gpu: iter(()))
        monkeypatch.delenv("TPX_KERNELS", raising=False)

    return has


def run(capsys, *words: str) -> tuple[int, list[str]]:
    code = main(("doctor", *words))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"tpx      {__version__}, Python {platform.python_version()}, Linux"
    return code, out[1:]


def test_a_laptop_is_well(capsys, machine):
    machine({"torch": "2.13.0+cpu"})
    assert run(capsys) == (
        0,
        [
            "torch    2.13.0+cpu",
            "triton   not installed: no kernels: the torch references run",
            "kernels  not installed: no kernels of the Hugging Face Hub",
            "GPU      none is visible",
            OFF,
        ],
    )


def test_a_gpu_host_runs_the_kernels(capsys, machine):
    machine({"torch": "2.13.0", "triton": "3.7.1", "kernels": "0.17.2"}, H100, "13.0")
    code, lines = run(capsys)
    assert code == 0
    assert lines[3] == "GPU      NVIDIA H100 80GB HBM3, 80 GiB, capability 9.0"
    assert [line.partition(" in ")[0] for line in lines[4:]] == [
        "kernels for attention, linear, sample: local, tpx_attention 1",
        "kernels for route, experts, norm: local, tpx_moe 1",
    ]


def test_what_was_asked_for_by_name_and_is_missing_is_a_fault(capsys, machine, monkeypatch):
    machine({"torch": "2.13.0"}, H100, "13.0")
    assert run(capsys)[0] == 0
    said = "fault: kernels were asked for, and the references run "
    code, lines = run(capsys, "--kernels", "experts=local")
    assert (code, lines[-1]) == (1, said + "experts")
    monkeypatch.setenv("TPX_KERNELS", "local")
    code, lines = run(capsys)
    assert (code, lines[-1]) == (1, f"{said}attention, linear, sample, route, experts, norm")
    assert run(capsys, "--kernels", "true")[0] == 0


def test_a_torch_that_does_not_use_the_gpu_is_a_fault(capsys, machine):
    machine({"torch": "2.13.0+cpu", "triton": "3.6.0"}, H100)
    code, lines = run(capsys)
    assert code == 1
    assert lines[-2:] == [
        OFF,
        "fault: torch 2.13.0+cpu is not built for CUDA: the GPU is not used",
    ]


def test_without_torch_nothing_runs(capsys, machine):
    machine({})
    code, lines = run(capsys)
    assert (code, lines[0]) == (1, "torch    not installed: nothing runs")
    assert lines[-1] == "fault: torch is not installed: `pip install torch`"


def test_wrong_words(capsys):
    assert main(("doctor", "--kernels", "x")) == 2
    assert capsys.readouterr().err.startswith("error: `--kernels` is `x`\n\nhint: give True, ")


def test_this_torch_says_what_it_is_built_for():
    import torch

    assert kernels_here.torch_cuda() == torch.version.cuda
