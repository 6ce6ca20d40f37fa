"""A checkpoint that changes and a disk that fails while `tpx launch` loads: one error, its exit
code, and no rank that stays."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from launching import finish, start, write_script
from test_launch_ranks import wait_until_gone
from tiny import tiny_checkpoint

SECONDS = 5.0  # from a rank's failure to the end of all ranks
# Rank 1's first read begins when all ranks load, and goes wrong; rank 0 waits in its first one.
WHILE_LOADING = """
    import errno, os, sys, time
    from pathlib import Path
    import tpx
    from tpx.models import load

    here, rank = Path(__file__).parent, os.environ["RANK"]

    def fail(fault, path):
        (here / "failed").write_text(str(time.time()))
        if fault == "broken disk":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        if fault == "rewritten":
            with path.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")
        if fault == "replaced":
            (here / "new").write_bytes(path.read_bytes())
            os.replace(here / "new", path)

    class Faulty(load.Files):
        failed = False

        def preadv(self, file, buffers, offset):
            (here / f"loads.{rank}").write_text(str(os.getpid()))
            while rank == "1" and len(list(here.glob("loads.*"))) < 2:
                time.sleep(0.01)
            while rank == "0":
                time.sleep(60)
            if not Faulty.failed:
                Faulty.failed = True
                fail(sys.argv[1], here / "model" / file)
            return super().preadv(file, buffers, offset)

    load.Files = Faulty
    tpx.LLM()
"""
AFTER_THE_CHECKS = """
    import os, sys, time
    from pathlib import Path
    here = Path(__file__).parent
    path = min((here / "model").glob("*.safetensors"))
    if os.environ["RANK"] == "1":
        if sys.argv[1] == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        if sys.argv[1] == "rewritten":
            with path.open("r+b") as file:
                file.seek(9)
                file.write(b"x")
        if sys.argv[1] == "replaced":
            (here / "new").write_bytes(path.read_bytes())
            os.replace(here / "new", path)
        if sys.argv[1] == "removed":
            path.unlink()
        (here / "changed").touch()
    while not (here / "changed").exists():
        time.sleep(0.01)
    import tpx
    with tpx.LLM() as llm:
        print(llm.report.mesh.world)
"""
GROUPS = "groups  tp, edp, slice: r0-1, inside a machine\n"
FILE = r"`model-\d+-of-\d+.safetensors`"
CHANGED = rf"{FILE} changed (after its header was checked|while it was loaded)"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def launch(script: str, fault: str, tiny: Path, folder: Path) -> subprocess.Popen[str]:
    shutil.copytree(tiny, folder / "model")
    path = write_script(folder, script)
    words = ("--nproc", 2, "--model", folder / "model", "--tp-plan", "tp2", path, fault)
    return start("launch", *words, cwd=folder)


def more(*values: object):
    return pytest.param(*values, marks=pytest.mark.more)


def soak(*values: object):
    """One of a kind that `make test-more` has another of."""
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        more("broken disk", 3, rf"rank 1: {FILE} cannot be read at byte `\d+`, in `\S+`: .* error"),
        soak(
            "truncated", 3, rf"rank 1: ({FILE} ends at|{CHANGED}: it has `\d+` bytes and had) `.*"
        ),
        soak("rewritten", 3, rf"rank 1: {CHANGED}: it was written to"),
        soak("replaced", 3, rf"rank 1: {CHANGED}: another file took its place"),
    ],
)
def test_one_rank_fails_while_all_load(tmp_path, tiny, fault, code, message):
    job, failed = launch(WHILE_LOADING, fault, tiny, tmp_path), tmp_path / "failed"
    while not (failed.exists() and failed.read_text()):
        assert job.poll() is None, finish(job).stderr
        time.sleep(0.01)
    wait_until_gone([int((tmp_path / f"loads.{rank}").read_text()) for rank in range(2)])
    seconds = time.time() - float(failed.read_text())
    done = finish(job)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.match(rf"{GROUPS}error: {message}\n\nhint: .+\n\Z", done.stderr), done.stderr
    assert seconds < SECONDS


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        more("truncated", f"{FILE} is cut short: it has .*"),
        soak("rewritten", f"{FILE} is damaged: the JSON does not parse: .*"),
        soak("removed", rf"{FILE} is missing from folder `\S+`"),
    ],
)
def test_the_checkpoint_changes_after_the_launchers_checks(tmp_path, tiny, fault, message):
    done = finish(launch(AFTER_THE_CHECKS, fault, tiny, tmp_path))
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert re.match(rf"{GROUPS}error: {message}\n\nhint: .+\n\Z", done.stderr), done.stderr


@pytest.mark.soak
def test_another_whole_checkpoint_may_take_its_place(tmp_path, tiny):
    done = finish(launch(AFTER_THE_CHECKS, "replaced", tiny, tmp_path))
    assert (done.returncode, done.stdout) == (0, "2\n2\n"), done.stderr
