"""Shipped plans, recipes, kernels and the page of `tpx plan explain` are found from a wheel, an
editable install and a bare source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from guards import ROOT

LIST_PLANS = (
    "import sys; from tpx.plan.find import plan_folder, shipped_plans;"
    "from tpx.cli.plan_html import TEMPLATE; assert '$body' in TEMPLATE.read_text();"
    "from tpx.kernels.local import find_local; from tpx.kernels.operations import PACKAGES;"
    "folders = [find_local(package) for package in PACKAGES];"
    "from tpx.launch.recipe import recipe_folder, shipped_recipes;"
    "from tpx.cli.render import KINDS;"
    "assert len(shipped_recipes()) > 5;"
    "assert all((recipe_folder() / 'templates' / file).is_file() for file, _ in KINDS.values());"
    "assert 'torch' not in sys.modules;"
    "print(plan_folder()); print(*sorted(shipped_plans('gpt_oss'))); print(*folders)"
)
KERNELS = [*(ROOT / "kernels").glob("*/torch-ext/*/")]
EXPECTED = sorted(path.stem for path in (ROOT / "plans" / "gpt_oss").glob("*.yaml"))


def seen_from(python_path: Path | None, cwd: Path) -> tuple[Path, list[str], set[Path]]:
    """The plans' folder and names, and the folders of the kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    done = subprocess.run(
        [sys.executable, "-c", LIST_PLANS],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, names, kernels = done.stdout.splitlines()
    return Path(folder), names.split(), {*map(Path, kernels.split())}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the tree."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("tpx", "plans", "launch", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(out), str(copy)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_a_wheel_holds_plans_and_kernels_and_finds_them(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    folder, names, kernels = seen_from(tmp_path / "site", tmp_path)
    assert folder == tmp_path / "site" / "tpx" / "plans"
    assert names == EXPECTED
    assert kernels == {tmp_path / "site" / path.name for path in KERNELS}


def test_a_source_tree_finds_them_from_another_folder(tmp_path):
    assert seen_from(ROOT, tmp_path) == (ROOT / "plans", EXPECTED, {*KERNELS})


def test_an_editable_install_finds_them(tmp_path):
    """The environment that runs the tests is one (`make test` installs it so)."""
    assert seen_from(None, tmp_path) == (ROOT / "plans", EXPECTED, {*KERNELS})


def test_a_wheel_holds_every_package_of_the_tree(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith((".py", ".json"))}
    roots = [ROOT / "tpx", *KERNELS]
    files = [(root, path) for root in roots for path in root.rglob("*.*")]
    assert held == {
        path.relative_to(root.parent).as_posix()
        for root, path in files
        if path.suffix in (".py", ".json")
    }
