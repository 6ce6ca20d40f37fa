"""What a rank tells of its progress, what counts as such in each phase, and where it stands."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import environment, write_script
from test_launch_shim import run

from tpx.launch import beat, examine
from tpx.launch.hang import read_group
from tpx.launch.progress import Writer
from tpx.launch.ranks_here import Told, processes_of, read_told, stat
from tpx.launch.watch import Limits, Patience, Watch


def test_patience_ends_where_ranks_wait_and_nothing_moves():
    patience = Patience(10)
    assert not patience.is_over({"bytes": 1}, True, 0.0)
    assert not patience.is_over({"bytes": 1}, True, 9.9)
    assert not patience.is_over({"bytes": 2}, True, 10.0)
    assert not patience.is_over({"bytes": 2}, False, 20.0)
    assert patience.is_over({"bytes": 2}, True, 20.0)
    assert not patience.is_over({"bytes": 2}, True, 30.0, times=5)
    assert patience.is_over({"bytes": 2}, True, 60.0, times=5)
    assert not Patience(0).is_over(None, True, 1e9)


TICKS = """
    import os, time
    from pathlib import Path
    from tpx.launch.beat import COMPILE, STEP, tick
    record = Path(os.environ["TPX_RUN_DIR"], "beats/0-0")
    for phase in (COMPILE, COMPILE, STEP):
        tick(phase)
    while '"step": 1' not in record.read_text():
        time.sleep(0.01)
    print(record.read_text())
    tick()
"""


def test_what_a_script_ticks_is_told_by_the_shims_thread(tmp_path):
    write_script(tmp_path, TICKS)
    done, _ = run(tmp_path, "script", "script.py", WORLD_SIZE="2")
    told = json.loads(done.stdout)
    assert (told["phase"], told["ticks"]) == ("step", {"compile": 2, "step": 1})
    [last] = read_told(tmp_path / "run/beats")
    assert (last.rank, last.attempt, last.pid) == (0, 0, told["pid"])


def test_a_tick_needs_no_launcher_and_no_time():
    began = time.perf_counter()
    for _ in range(1000):
        beat.tick("step")
    beat.tick()
    assert time.perf_counter() - began < 0.1
    assert beat.TICKS.phase == ""
    assert beat.TICKS.counts["step"] >= 1000


class Quiet:
    """Of a run whose files nobody reads."""

    def event(self, kind: str, **told: object) -> None:
        pass


def tell(folder: Path, rank: int, pid: int, **told: object) -> None:
    known = {"pid": pid, "attempt": 0, "modules": 3, "counts": {}, "phase": "", "ticks": {}}
    (folder / f"0-{rank}").write_text(json.dumps(known | told))


@pytest.fixture
def job(tmp_path):
    """A watched rank, how to change what it tells, and what it has printed."""
    heard = [0]
    found = Watch(tmp_path, Quiet(), Limits(3, 100), lambda: heard[0], print)  # type: ignore[arg-type]
    (tmp_path / "beats").mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:

        def hangs(now: float, **told: object) -> bool:
            tell(tmp_path / "beats", 1, process.pid, **told)
            found._look()
            return found._hangs(now)

        yield hangs, heard, tmp_path
        process.communicate(b"\n")


WAITS = {"counts": {"gloo.0": [3, 2]}}
STEP = {"phase": "step", "ticks": {"step": 1}}


@pytest.mark.parametrize(
    ("before", "after", "hangs_at"),
    [
        (WAITS, {"counts": {"gloo.0": [4, 3]}}, 200),  # a step, by its collectives
        (STEP, {"phase": "step", "ticks": {"step": 2}}, 200),  # a step on a GPU, by its beginning
        (WAITS, WAITS | {"modules": 4}, 200),  # a script that is still starting
        (WAITS | {"phase": "compile", "ticks": {"compile": 1}},
         WAITS | {"phase": "compile", "ticks": {"compile": 2}}, 600),  # kernel by kernel
    ],
)  # fmt: skip
def test_what_is_progress_and_how_long_it_may_take(job, before, after, hangs_at):
    hangs, _, _ = job
    assert not hangs(0, **before)
    assert not hangs(100, **after)
    assert not hangs(hangs_at - 1, **after)
    assert hangs(hangs_at, **after)


def test_bytes_that_are_loaded_or_printed_are_progress(job):
    hangs, heard, folder = job
    writer = Writer(folder / "progress/1")
    assert not hangs(0, **WAITS)
    writer.update("load", 5, 10, 10)
    assert not hangs(100, **WAITS)
    heard[0] = 7
    assert not hangs(200, **WAITS)
    assert not hangs(299, **WAITS)
    assert hangs(300, **WAITS)


def test_a_rank_that_nobody_can_wait_for_may_take_any_time(job):
    hangs, _, _ = job
    assert not hangs(0)
    assert not hangs(1e9)


NEW = {"pg_id": 0, "process_group": ("0", "default_pg"), "collective_seq_id": 2, "is_p2p": False,
       "profiling_name": "gloo:all_reduce", "input_sizes": [[4]],
       "input_dtypes": ["Float"]}  # fmt: skip
OLD = {"pg_id": 0, "collective_seq_id": 2, "profiling_name": "nccl:_all_gather_base"}


@pytest.mark.parametrize(
    ("status", "entry", "name", "ends", "op"),
    [
        ({"last_enqueued_collective": 2, "last_completed_collective": 1}, NEW, "0", (2, 1),
         "all_reduce of [4]"),
        ({"last_enqueued_collective": -1, "last_completed_collective": "-1"}, NEW, "0", (0, 0),
         "all_reduce of [4]"),
        ({"last_enqueued_collective": 2}, OLD, "0", (2, 0), "all_gather_base"),
        (None, OLD, "0", (2, 2), "all_gather_base"),
        (None, {"collective_seq_id": 2}, "None", (2, 2), "collective"),
    ],
)  # fmt: skip
def test_a_recorder_that_tells_less_is_read_too(monkeypatch, status, entry, name, ends, op):
    def short(includeCollectives: bool) -> str:
        return json.dumps({} if status is None else {"pg_status": {"0": status}})

    dump = pickle.dumps({"entries": [entry, {"is_p2p": True}, {}]})
    monkeypatch.setattr(beat, "recorders", lambda: [("gloo", short, lambda *_: dump)])
    [found] = map(read_group, beat.groups())
    assert (found.name, (found.entered, found.ended)) == (name, ends)
    assert str(found.entry(2)) == op


BEATS = """
    import importlib.util, os, sys, time
    from pathlib import Path
    from tpx.launch.beat import Beat
    here = Path(sys.argv[1])
    here.mkdir()
    def spin():
        (here / "spins").touch()
        while not (here / "end").exists():
            pass
    beat = Beat(here, "3")
    spin()
    beat.stop()
"""


@pytest.fixture
def busy(tmp_path):
    """A process with a beat that spins until there is a file `end`."""
    script = write_script(tmp_path, BEATS)
    folder = tmp_path / "beats"
    process = subprocess.Popen(
        [sys.executable, script, folder], env=environment(RANK="3"), stdout=subprocess.PIPE
    )
    while not (folder / "spins").exists() and process.poll() is None:
        time.sleep(0.005)
    yield process, folder
    process.kill()
    process.communicate()


def test_a_busy_rank_says_where_it_is(tmp_path, busy):
    process, folder = busy
    [told] = read_told(folder)
    assert told[:3] == (3, process.pid, 0)
    assert (told.counts, told.phase, told.ticks, told.waits) == ({}, "", {}, False)
    error = examine.examine(tmp_path, {3: process.pid}, {0: None}, 5.0)
    assert error.message.startswith("nothing has moved for 5 s: rank 0 has ended, rank 3 is at ")
    assert error.message.endswith(
        ('in `spin`: `while not (here / "end").exists():`', "in `spin`: `pass`")
    )
    stacks = (tmp_path / "hang/rank3.stacks").read_text()
    assert "in spin" in stacks
    assert "in _run" in stacks
    (folder / "end").touch()
    assert process.wait(20) == 0


def test_a_rank_that_is_stopped_is_told_so(tmp_path, busy, monkeypatch):
    process, _ = busy
    monkeypatch.setattr(examine, "PATIENCE", 0.1)
    os.kill(process.pid, 19)
    while (seen := stat(process.pid)) is None or seen.state != "T":
        time.sleep(0.005)
    error = examine.examine(tmp_path, {3: process.pid}, {}, 5.0)
    assert error.message == (
        f"nothing has moved for 5 s: rank 3 is stopped (`kill -CONT {process.pid}` lets it go on)"
    )


def test_records_of_all_attempts_are_read_but_those_that_are_not_whole(tmp_path):
    for rank, attempt in ((2, 0), (1, 1), (3, 0)):
        told = Told(rank, 7, attempt, 3, {"a.0": [2, 1]}, "", {})._asdict()
        del told["rank"]
        (tmp_path / f"{attempt}-{rank}").write_text(json.dumps(told) + "  ")
    (tmp_path / "0-4").write_text('{"pid": 1')
    (tmp_path / "3.stacks").touch()
    found = read_told(tmp_path)
    assert [(each.attempt, each.rank) for each in found] == [(0, 2), (0, 3), (1, 1)]
    assert all(each.waits for each in found)


def test_processes_of_a_session_are_found(tmp_path):
    waits = [sys.executable, "-c", "import subprocess, sys; "
             "subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"]  # fmt: skip
    with subprocess.Popen(
        waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = processes_of([process.pid])
        assert process.pid in found
        assert len(found) == 2
        process.communicate(b"\n")
    assert processes_of([process.pid]) == []
    assert processes_of([]) == []
