"""Runs `tpx generate` in this process, with a rank that is this process too, or with none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpx.cli.generate_bar import read_record
from tpx.cli.main import main
from tpx.generate_file import main as rank
from tpx.launch.report import Ending


def in_this_process(job, options, drawer) -> Ending:
    """As one rank would be run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in job.environment.items():
            patch.setenv(name, value)
        rank(*job.command.args)
    drawer.__self__.hear(read_record(job.run_dir / "progress"))
    return Ending(0)


def write(*lines: object, name: str = "in.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(capsys, tiny, *words: object) -> tuple[int, str]:
    given = ("--model", tiny, "--input", "in.jsonl", "--output", "out.jsonl", "--nproc", 1,
             "--device", "cpu", "--max-new-tokens", 6, *words)  # fmt: skip
    code = main(["generate", *map(str, given)])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def no_ranks(*_: object) -> Ending:
    raise AssertionError("a rank would start")
