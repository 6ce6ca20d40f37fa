"""What README and docs show works: every command and every block of code is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from guards import ROOT, shell_commands
from launching import environment

from tpx.plan.find import read_plan
from tpx.plan.load import parse_plan

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted({command for page in PAGES for command in shell_commands(page.read_text())})
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a folder that has the repository's examples, so that nothing is written into it."""
    command = re.sub(r"^tpx ", f"{sys.executable} -m tpx ", command)
    command = re.sub(r"^torchrun ", f"{TORCHRUN} ", command)
    command = re.sub(r"^python ", f"{sys.executable} ", command)
    (cwd / "examples").symlink_to(ROOT / "examples")
    (cwd / "scripts").symlink_to(ROOT / "scripts")
    words = shlex.split(command)
    return subprocess.run(
        words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make ")])
def test_a_command_of_the_docs_runs(command, tmp_path):
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_make_target_of_the_docs_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = {word for c in COMMANDS if c.startswith("make ") for word in c.split()[1:]}
    assert asked
    assert asked <= {*targets}


def test_the_readmes_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [code] = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "Report(" in capsys.readouterr().out


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
    assert shell_commands(page) == ["make x", "tpx a    b"]
