"""What README and docs show works: every command and every block of code is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guards import ROOT, shell_blocks
from launching import environment

from tpx.plan.find import read_plan
from tpx.plan.load import parse_plan

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in shell_blocks(page.read_text())]
# README's first block runs on every commit, all others in `make test-more`.
RUN = [b for b in BLOCKS if "make " not in b]
RUN = [RUN[0], *(pytest.param(block, marks=pytest.mark.more) for block in RUN[1:])]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", RUN)
def test_a_block_of_commands_runs(block, tmp_path):
    """In a folder with the repository's examples, so that nothing is written into the tree."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", block],
        cwd=tmp_path,
        env=environment() | {"PATH": programs},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_make_target_of_the_docs_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = {target for block in BLOCKS for target in re.findall(r"^make ([\w-]+)", block, re.M)}
    assert asked
    assert asked <= {*targets}


def test_the_readmes_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "Report(" in out
    assert out.endswith("']\n")


def test_the_readmes_plan_is_the_shipped_one():
    [text] = blocks(ROOT / "README.md", "yaml")
    plan, shipped = parse_plan(text, "README.md"), read_plan("tp2-ep2", "gpt_oss")
    assert plan.mesh == shipped.mesh
    assert {r.pattern: r.style for r in plan.rules} == {r.pattern: r.style for r in shipped.rules}


def test_every_link_of_the_docs_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_are_found_in_sh_blocks_alone():
    page = "a\n```sh\nmake x  # why\ntpx a \\\n  b\n```\n```python\nmake y\n```\n"
    assert shell_blocks(page) == ["make x  # why\ntpx a \\\n  b\n"]
