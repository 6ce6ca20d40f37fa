"""Every example runs, by torchrun and by `tpx launch`, and writes the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment, finish, start

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DEMO = ROOT / "examples" / "models" / "tpx-demo"
MOST_LINES = 40
RUNS = [  # one on every commit, the others in `make test-more`
    pytest.param(path, id=path.stem, marks=() if path.stem == "generate" else pytest.mark.more)
    for path in EXAMPLES
]


def under_torchrun(script: Path, cwd: Path) -> subprocess.Popen[str]:
    words = ["--standalone", "--nproc-per-node", "2", str(script), str(DEMO)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def under_launch(script: Path, cwd: Path) -> subprocess.Popen[str]:
    """The model comes from the command line, and the script is given none."""
    return start("launch", "--nproc", 2, "--model", DEMO, script, cwd=cwd)


def what_it_writes(script: Path, out: str) -> None:
    """generate.py and logits.py print text and figures, custom_plan.py also what ranks hold."""
    lines = out.strip().splitlines()
    if script.stem == "logits":
        [line] = lines
        assert float(line.split()[-4]) > 0
    elif script.stem == "custom_plan":
        assert [line.split()[:2] for line in lines[:2]] == [["rank", "0"], ["rank", "1"]]
        assert lines[2].startswith("The")
    else:
        assert out.startswith("The")
        assert "\n\nA list of" in out
        assert "\n\nIn this" in out


@pytest.mark.parametrize("script", RUNS)
def test_an_example_writes_the_same_under_both_launchers(script, tmp_path):
    jobs = [under_launch(script, tmp_path), under_torchrun(script, tmp_path)]
    done = [finish(job) for job in jobs]
    for one in done:
        assert one.returncode == 0, one.stderr
    what_it_writes(script, done[0].stdout)
    assert done[1].stdout == done[0].stdout


def test_there_are_three_of_at_most_40_lines():
    assert [path.stem for path in EXAMPLES] == ["custom_plan", "generate", "logits"]
    for path in EXAMPLES:
        assert path.read_text().count("\n") <= MOST_LINES
