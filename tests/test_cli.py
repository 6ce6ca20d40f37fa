"""`tpx` itself: help, version, unknown words, and how every kind of error ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from launching import TPX, environment, tpx

from tpx.cli import main as module
from tpx.cli.main import main
from tpx.errors import EXIT_CODES, CheckpointError, LaunchError, PlanError, RequestError
from tpx.version import __version__


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"tpx {__version__}\n", "")


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_the_commands(capsys, words):
    code, out, error = run(capsys, *words)
    assert (code, error) == (0, "")
    assert "\n  launch   start ranks" in out
    assert "\n  generate continue the requests of a file" in out
    assert "\n  plan     prove, explain, compare and choose plans" in out
    assert "\n  shard    write a checkpoint as one file a rank" in out
    assert "\n  verify   run a plan on real ranks" in out
    assert "\n  bench    measure a model's speed" in out
    assert "\n  doctor   what this machine has" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_launchers_help_fits_a_terminal(capsys):
    code, out, _ = run(capsys, "launch", "--help")
    assert code == 0
    assert out.startswith("Usage: tpx launch [FLAGS] [RECIPE] [SCRIPT | -m MODULE] [ARGS...]\n")
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) < 60


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("lanch",),
         "error: tpx has no command `lanch`\n\nhint: did you mean `launch`, `plan` or `bench`?\n"),
        (("run",),
         "error: tpx has no command `run`\n\n"
         "hint: use `launch`, `generate`, `plan`, `shard`, `verify`, `bench`, `render` or "
         "`doctor`\n"),
        (("--versoin",), "error: tpx has no flag `--versoin`\n\nhint: did you mean `--version`?\n"),
        (("launch", "--modle", "x"),
         "error: `tpx launch` has no flag `--modle`\n\n"
         "hint: did you mean `--model` or `--nnodes`?\n"),
        (("plan", "chek"), "error: `tpx plan` knows no `chek`\n\nhint: did you mean `check`?\n"),
        (("plan", "check", "x", "--model", "m", "--wrold", "2"),
         "error: `tpx plan check` has no argument `--wrold`\n\nhint: did you mean `--world`?\n"),
        (("plan", "show", "x"),
         "error: `tpx plan show`: the following arguments are required: --model\n\n"
         "hint: see `tpx plan show --help`\n"),
    ],
)  # fmt: skip
def test_unknown_words(capsys, words, text):
    assert run(capsys, *words) == (2, "", text)


def raising(error: BaseException):
    def dispatch(argv: list[str]) -> int:
        raise error

    return dispatch


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PlanError("m"), 2),
        (RequestError("m"), 2),
        (CheckpointError("m"), 3),
        (LaunchError("m"), 3),
        (LaunchError("m", exit_code=7), 7),
    ],
)
def test_each_error_has_its_exit_code(capsys, monkeypatch, error, code):
    monkeypatch.setattr(module, "dispatch", raising(error))
    assert run(capsys, "x") == (code, "", "error: m\n")
    assert code in EXIT_CODES


def test_ctrl_c_is_silent(capsys, monkeypatch):
    monkeypatch.setattr(module, "dispatch", raising(KeyboardInterrupt()))
    assert run(capsys) == (130, "", "")


def test_anything_else_is_a_bug(capsys, monkeypatch):
    monkeypatch.setattr(module, "dispatch", raising(KeyError("x")))
    text = (
        "error: a bug in tpx: `KeyError: 'x'`\n\n"
        "hint: run it again with `--traceback`, and report it in tpx's issue tracker\n"
    )
    assert run(capsys, "launch") == (70, "", text)
    code, _, error = run(capsys, "--traceback", "launch")
    assert code == 70
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.endswith(text)


def test_a_traceback_is_shown_where_it_is_asked_for(capsys):
    code, _, error = run(capsys, "launch", "--traceback", "none.py")
    assert code == 3
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.endswith("error: script `none.py` does not exist\n\n"
                          "hint: give the path of a Python file\n")  # fmt: skip


def test_a_closed_output_ends_in_silence():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*TPX, "--help"], stdout=write, stderr=subprocess.PIPE, env=environment(), text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_module_is_the_command(tmp_path):
    done = tpx("launch", "none.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    script = f"{os.path.dirname(sys.executable)}/tpx"
    if os.path.exists(script):
        words = [script, "--version"]
        shown = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
        assert shown.stdout == f"tpx {__version__}\n"
