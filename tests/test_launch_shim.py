"""What a rank's script sees under shim.py, and the record that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment, write_script

from tpx.launch import shim
from tpx.launch.command import SHIM
from tpx.split import split

PYTHON_SHIM = (sys.executable, str(SHIM))


def run(
    folder: Path, *words: str, launcher: int | None = None, start=PYTHON_SHIM, **variables: str
):
    """The shim's process, and the record of rank 0 (None: it left none)."""
    (folder / "run").mkdir(exist_ok=True)
    ranks = {"RANK": "0", "LOCAL_WORLD_SIZE": "1", "TPX_RUN_DIR": str(folder / "run")}
    done = subprocess.run(
        [*start, str(launcher or os.getpid()), *words],
        cwd=folder,
        env=environment(**ranks | variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    path = folder / "run" / "errors" / "0-0.json"
    return done, json.loads(path.read_text()) if path.exists() else None


SEEN = """
    import sys, json, pickle, atexit, inspect
    class Here: pass
    def late(): assert pickle.loads(pickle.dumps(Here())).__class__ is Here
    atexit.register(late)
    import report  # beside the script, and not the launcher's own
    main = sys.modules["__main__"]
    print(json.dumps([sys.argv, sys.path[0], __name__, __file__, main.Here is Here,
                      report.SAYS, inspect.getsource(late).startswith("def late"), __spec__]))
"""


def test_a_script_sees_what_python_would_show_it(tmp_path):
    write_script(tmp_path, SEEN)
    write_script(tmp_path, "SAYS = 'mine'", "report.py")
    done, record = run(tmp_path, "script", "script.py", "--flag", "a b", "")
    plain = subprocess.run(
        [sys.executable, "script.py", "--flag", "a b", ""],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, "")
    assert json.loads(plain.stdout)[0] == ["script.py", "--flag", "a b", ""]
    assert record is None


def test_a_module_runs_as_python_m_does(tmp_path):
    (tmp_path / "package").mkdir()
    write_script(tmp_path / "package", "from . import b; print(b.X, __name__)", "a.py")
    write_script(tmp_path / "package", "X = 3", "b.py")
    done, _ = run(tmp_path, "module", "package.a")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 __main__\n", "")


def test_tpx_is_importable_from_a_source_tree_that_is_not_installed(tmp_path):
    write_script(tmp_path, "import tpx; print(tpx.__file__)")
    without_packages = [sys.executable, "-S", str(SHIM)]
    done, _ = run(tmp_path, "script", "script.py", start=without_packages, PYTHONPATH="")
    assert done.stdout == f"{ROOT / 'tpx' / '__init__.py'}\n"


def test_an_exception_is_recorded_and_not_printed(tmp_path):
    script = write_script(
        tmp_path,
        """
        from tpx.split import split
        def f():
            split(1, 0)
        try:
            {}["key"]
        except KeyError as error:
            try:
                f()
            except AssertionError as again:
                raise ValueError("two\\nlines") from again
        """,
    )
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert record["rank"] == 0
    assert record["kind"] == "raised"
    assert record["message"] == "ValueError: two\nlines"
    assert [text.partition(":")[0] for text in record["chain"]] == [
        "ValueError",
        "AssertionError",
        "KeyError",
    ]
    assert "shim.py" not in record["full_traceback"]
    assert "tpx/split.py" in record["full_traceback"]
    assert f'File "{script}", line 3, in f' in record["traceback"]
    assert "tpx/split.py" not in record["traceback"]


def test_a_traceback_keeps_its_last_frame_where_all_are_internal():
    with pytest.raises(AssertionError) as caught:
        split(1, 0)
    caught.value.__traceback__ = caught.tb.tb_next  # without this test's own frame
    told = shim.format_error(caught.value, trim=True)
    assert 'tpx/split.py", line' in told


def test_a_full_disk_does_not_end_a_rank(tmp_path):
    write_script(tmp_path, "print('ran')")
    (tmp_path / "run/beats").mkdir(parents=True)
    (tmp_path / "run/beats/0-0").symlink_to("/dev/full")
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, done.stdout, done.stderr, record) == (0, "ran\n", "", None)


def test_an_error_that_cannot_be_recorded_is_printed(tmp_path):
    write_script(tmp_path, "raise ValueError('boom')")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/errors").symlink_to("/dev/full")
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, record) == (1, None)
    assert done.stderr.endswith("ValueError: boom\n")


def test_a_syntax_error_is_recorded_with_its_line(tmp_path):
    script = write_script(tmp_path, "x = 1\ny = (")
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, done.stderr) == (1, "")
    assert record["message"].startswith(f'File "{script}", line 2')
    assert record["message"].endswith("SyntaxError: '(' was never closed")


def test_a_tpx_error_is_recorded_with_hint_and_exit_code(tmp_path):
    write_script(tmp_path, "import tpx\nraise tpx.PlanError('a `plan`', 'a hint')")
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, done.stderr) == (2, "")
    assert (record["kind"], record["message"], record["hint"], record["exit_code"]) == (
        "tpx",
        "a `plan`",
        "a hint",
        2,
    )


@pytest.mark.parametrize(
    ("call", "code", "error"),
    [("sys.exit(7)", 7, ""), ("sys.exit(-1)", 255, ""), ("sys.exit('words')", 1, "words\n")],
)
def test_a_scripts_own_exit_code_passes_through(tmp_path, call, code, error):
    write_script(tmp_path, f"import sys\n{call}")
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, done.stderr) == (code, error)
    assert (record["kind"], record["exit_code"]) == ("exit", code)


@pytest.mark.parametrize("call", ["sys.exit()", "sys.exit(0)", "pass"])
def test_a_good_end_leaves_no_record(tmp_path, call):
    write_script(tmp_path, f"import sys\n{call}")
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, done.stderr, record) == (0, "", None)


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_output_ends_in_silence(tmp_path, lines):
    """One line is only missed at the end, many while the script runs."""
    script = write_script(tmp_path, f"import sys; [print(i) for i in range({lines})]")
    read, write = os.pipe()
    os.close(read)
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, str(SHIM), str(os.getpid()), "script", str(script)],
        env=environment(RANK="0", TPX_RUN_DIR=str(tmp_path / "run"), LOCAL_WORLD_SIZE="1"),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert json.loads((tmp_path / "run/errors/0-0.json").read_text())["kind"] == "pipe"


def test_a_broken_pipe_of_the_scripts_own_is_an_error_as_any_other(tmp_path):
    write_script(tmp_path, "import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')")
    done, record = run(tmp_path, "script", "script.py")
    assert (done.returncode, record["class"]) == (1, "BrokenPipeError")


def test_a_rank_whose_launcher_is_gone_does_not_start(tmp_path):
    write_script(tmp_path, "print('ran')")
    done, _ = run(tmp_path, "script", "script.py", launcher=1)
    assert (done.returncode, done.stdout) == (137, "")


def test_lines_are_written_whole(tmp_path):
    """Each write of the process is a line, so that the lines of several ranks do not mix."""
    write_script(tmp_path, "print('a', 'b', 3)\nprint('c', end='\\n')")
    reader = write_script(
        tmp_path,
        """
        import os, subprocess, sys
        read, write = os.pipe2(os.O_DIRECT)  # a packet a write
        words = [sys.executable, sys.argv[1], str(os.getpid()), "script", "script.py"]
        subprocess.run(words, stdout=write)
        os.close(write)
        print([os.read(read, 100), os.read(read, 100), os.read(read, 100)])
        """,
        "reader.py",
    )
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, reader, str(SHIM)],
        cwd=tmp_path,
        env=environment(RANK="0", TPX_RUN_DIR=str(tmp_path / "run"), LOCAL_WORLD_SIZE="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[b'a b 3\\n', b'c\\n', b'']\n"
