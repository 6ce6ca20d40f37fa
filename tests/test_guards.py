"""The guards of the source tree, and for each guard a tree on which it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest
from guards import (
    ROOT,
    environment_violations,
    family_violations,
    layer_violations,
    length_violations,
    shadowing_packages,
    sources,
    torch_violations,
)

TPX = sources(ROOT, "tpx")
EVERYTHING = sources(ROOT, "tpx", "tests", "scripts", "examples", "kernels")


def test_a_layer_imports_only_from_those_above_it():
    assert layer_violations(TPX) == []


def test_the_plan_side_needs_no_torch_and_three_files_know_torch_distributed():
    assert torch_violations(TPX) == []


def test_only_the_launcher_and_the_worker_read_the_environment():
    assert environment_violations(TPX) == []


def test_only_a_familys_own_files_name_it():
    assert family_violations(TPX) == []


def test_no_file_is_longer_than_300_lines():
    assert length_violations(EVERYTHING) == []


def test_no_top_level_folder_shadows_an_installed_package():
    assert shadowing_packages() == []


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        (
            "tpx/split.py",
            "from .plan.types import Plan",
            ["tpx/split.py:1: layer 0 imports tpx.plan.types of layer 2"],
        ),
        (
            "tpx/plan/resolve.py",
            "def f():\n    from .. import comm",
            ["tpx/plan/resolve.py:2: layer 2 imports tpx.comm of layer 4"],
        ),
        ("tpx/utils.py", "", ["tpx/utils.py: belongs to no layer"]),
    ],
)
def test_the_layer_guard_can_fail(path, text, found):
    assert layer_violations({path: text}) == found


def test_the_torch_guard_can_fail():
    assert torch_violations({"tpx/index.py": "import torch"}) == ["tpx/index.py:1: imports torch"]
    assert torch_violations({"tpx/launch/report.py": "def f():\n    import torch"}) == [
        "tpx/launch/report.py:2: imports torch"
    ]
    assert torch_violations({"tpx/llm.py": "import torch.distributed as dist"}) == [
        "tpx/llm.py:1: imports torch.distributed"
    ]
    assert torch_violations({"tpx/llm.py": "torch.distributed.barrier()"}) == [
        "tpx/llm.py: uses torch.distributed"
    ]
    assert torch_violations({"tpx/comm.py": "import torch.distributed as dist"}) == []


def test_the_other_guards_can_fail(tmp_path):
    assert environment_violations({"tpx/llm.py": "os.environ['X']"}) == ["tpx/llm.py"]
    assert family_violations({"tpx/llm.py": "if model_type == 'gpt_oss':"}) == ["tpx/llm.py"]
    assert length_violations({"tpx/llm.py": "\n" * 301}) == ["tpx/llm.py: 301 lines"]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert shadowing_packages(tmp_path) == ["kernels"]
    for folder in ("torch-ext/tpx_x", "tests"):
        (tmp_path / "kernels" / "tpx-x" / folder).mkdir(parents=True)
        (tmp_path / "kernels" / "tpx-x" / folder / "__init__.py").touch()
    assert shadowing_packages(tmp_path) == ["kernels", "kernels/tpx-x/tests"]


@pytest.mark.parametrize(
    "module",
    [
        "tpx",
        "tpx.kernels",
        "tpx.plan.prepare",
        "tpx.launch.preflight",
        "tpx.cli.main",
        "tpx.engine.scheduler",
    ],
)
def test_importing_a_torch_free_module_leaves_torch_out(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
