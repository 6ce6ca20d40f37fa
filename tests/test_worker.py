"""A rank's place, device and process group, and errors under plain torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import environment, write_script
from ranks import ranks

from tpx import worker
from tpx.errors import LaunchError, RequestError, TpxError
from tpx.launch.progress import announce
from tpx.mesh import Mesh
from tpx.worker import ALONE, Place, Worker, choose_device, place, setting, start


def refusal(call, *arguments) -> tuple[str, str | None, int]:
    with pytest.raises(TpxError) as raised:
        call(*arguments)
    return raised.value.message, raised.value.hint, raised.value.exit_code


def test_a_process_by_itself_is_alone():
    assert place({}) == ALONE == Place(0, 1, 0, 1)
    assert place({"WORLD_SIZE": "4"}) == ALONE


def test_torchruns_variables_say_where_a_rank_is():
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place(given) == Place(5, 8, 1, 4)
    assert place({"RANK": "1", "WORLD_SIZE": "2"}) == Place(1, 2, 1, 2)


def test_rank_without_world_size():
    assert refusal(place, {"RANK": "0"}) == (
        "`RANK` is `0`, and `WORLD_SIZE` is not set",
        "start the script with `tpx launch` or `torchrun`, or `unset RANK`",
        3,
    )


def test_variables_that_make_no_sense():
    assert refusal(place, {"RANK": "x", "WORLD_SIZE": "2"}) == (
        "`RANK` is `x`, and must be a whole number",
        "start the script with `tpx launch` or `torchrun`, which set it",
        3,
    )
    assert refusal(place, {"RANK": "2", "WORLD_SIZE": "2"}) == (
        "`RANK` is `2`, and `WORLD_SIZE` is `2`", "ranks are numbered from 0 to 1", 3
    )  # fmt: skip


def test_an_argument_comes_before_a_variable_and_that_before_the_default(monkeypatch):
    monkeypatch.delenv("TPX_MODEL", raising=False)
    assert (setting(None, "TPX_MODEL"), setting(None, "TPX_MODEL", "d")) == (None, "d")
    monkeypatch.setenv("TPX_MODEL", "variable")
    assert setting(None, "TPX_MODEL", "d") == "variable"
    assert setting("argument", "TPX_MODEL", "d") == "argument"
    monkeypatch.setenv("TPX_MODEL", "")
    assert setting(None, "TPX_MODEL", "d") == "d"


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that this machine has some."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    ("count", "device", "where", "expected"),
    [
        (0, None, ALONE, "cpu"),
        (0, "cpu", Place(1, 4, 1, 4), "cpu"),
        (2, None, ALONE, "cuda:0"),
        (2, "cpu", ALONE, "cpu"),
        (2, "cuda:1", ALONE, "cuda:1"),
        (4, None, Place(6, 8, 2, 4), "cuda:2"),
        (4, "cuda", Place(6, 8, 2, 4), "cuda:2"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_or_the_cpu(gpus, count, device, where, expected):
    gpus(count)
    assert choose_device(device, where) == torch.device(expected)


def test_a_device_that_is_not_there(gpus):
    gpus(0)
    assert refusal(choose_device, "cuda", ALONE) == (
        "`device='cuda'` needs a GPU, and none is visible",
        'use `device="cpu"`, or `tpx launch --device cpu`',
        3,
    )
    gpus(1)
    assert refusal(choose_device, None, Place(0, 2, 0, 2)) == (
        "2 ranks of this machine need 2 GPUs, and 1 is visible",
        'use `device="cpu"`, or `tpx launch --device cpu`',
        3,
    )
    assert refusal(choose_device, "cuda:3", ALONE) == (
        "`device='cuda:3'` does not exist: 1 GPUs are visible", "use `cuda:0` to `cuda:0`", 3
    )  # fmt: skip
    assert refusal(choose_device, "tpu", ALONE) == (
        "`device='tpu'` is unknown", 'use `device="cuda"` or `device="cpu"`', 2
    )  # fmt: skip


def test_a_rank_without_an_address(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert refusal(start, Place(0, 2, 0, 2), torch.device("cpu")) == (
        "`WORLD_SIZE` is `2`, and `MASTER_ADDR` is not set",
        "start the script with `tpx launch` or `torchrun`, which set it",
        3,
    )


def test_alone_there_is_no_process_group():
    worker.start(ALONE, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    groups = Worker("cpu").groups(Mesh())
    assert groups["world"].size == 1


def uses_the_group_that_is_there() -> tuple:
    mine = torch.distributed.group.WORLD
    del os.environ["RANK"]  # the group knows it
    found = Worker("cpu")
    groups = found.groups(Mesh(tp=2, edp=2))
    total = groups["tp"].all_reduce(torch.ones(1), "test")
    return torch.distributed.group.WORLD is mine, found.place, total.item()


def test_a_group_that_a_script_made_is_used():
    assert ranks(2).run(uses_the_group_that_is_there) == [
        (True, Place(rank, 2, rank, 2), 2.0) for rank in range(2)
    ]


def machine(places: list[Place]) -> tuple[int, ...]:
    """The ranks that share this one's machine, as a gather over them says."""
    mine = places[torch.distributed.get_rank()]
    os.environ.update(LOCAL_RANK=str(mine.local_rank), LOCAL_WORLD_SIZE=str(mine.local_world))
    groups = Worker("cpu").groups(Mesh(tp=4, edp=4))
    found = groups["node"].all_gather(torch.tensor([mine.rank]), "who").tolist()
    assert tuple(found) == groups["node"].ranks
    groups.close()
    return groups["node"].ranks


@pytest.mark.parametrize(
    ("local_ranks", "local_worlds", "expected"),
    [
        ((0, 1, 2, 3), (4, 4, 4, 4), [(0, 1, 2, 3)] * 4),
        ((0, 1, 0, 1), (2, 2, 2, 2), [(0, 1), (0, 1), (2, 3), (2, 3)]),
        ((0, 0, 0, 0), (1, 1, 1, 1), [(0,), (1,), (2,), (3,)]),
        ((0, 0, 1, 2), (1, 3, 3, 3), [(0,), (1,), (2,), (3,)]),  # of different sizes
        ((0, 1, 0, 0), (2, 2, 1, 1), [(0,), (1,), (2,), (3,)]),
        ((0, 0, 1, 1), (2, 2, 2, 2), [(0,), (1,), (2,), (3,)]),  # not consecutive
        ((0, 1, 2, 0), (3, 3, 3, 3), [(0,), (1,), (2,), (3,)]),
    ],
)
def test_the_ranks_of_a_machine_are_a_group(local_ranks, local_worlds, expected):
    places = [Place(r, 4, local_ranks[r], local_worlds[r]) for r in range(4)]
    assert ranks(4).run(machine, places) == expected


RAISES = """
    import os, sys, tpx, tpx.worker
    tpx.worker.Worker("cpu")
    say = f" on rank {os.environ['RANK']}" if sys.argv[1] == "each" else ""
    raise tpx.PlanError(f"bad `plan`{say}", "do so")
"""


def run_two(folder: Path, word: str) -> list[tuple[int, str]]:
    """Two ranks of this process, as torchrun would start them: exit codes and stderr."""
    script = write_script(folder, RAISES)
    jobs = [
        subprocess.Popen(
            [sys.executable, str(script), word],
            env=environment(RANK=str(rank), WORLD_SIZE="2", TMPDIR=str(folder)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [(job.returncode, error) for job in jobs for _, error in [job.communicate(timeout=60)]]


def test_under_torchrun_an_error_is_printed_once_and_all_exit_with_its_code(tmp_path):
    ends = run_two(tmp_path, "same")
    assert [code for code, _ in ends] == [2, 2]
    assert sorted(error for _, error in ends) == ["", "error: bad `plan`\n\nhint: do so\n"]


def test_under_torchrun_different_errors_are_all_printed(tmp_path):
    ends = run_two(tmp_path, "each")
    assert [error for _, error in ends] == [
        f"error: bad `plan` on rank {rank}\n\nhint: do so\n" for rank in range(2)
    ]


def test_other_errors_keep_the_hook_that_was_there():
    seen = []
    error = ValueError("boom")
    worker.end_with_error(lambda *told: seen.append(told), ValueError, error, None)
    assert seen == [(ValueError, error, None)]


def test_rank_without_world_size_ends_a_script_without_a_traceback(tmp_path):
    script = write_script(tmp_path, "import tpx\ntpx.LLM('model')")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(RANK="0", TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stderr == (
        "error: `RANK` is `0`, and `WORLD_SIZE` is not set\n\n"
        "hint: start the script with `tpx launch` or `torchrun`, or `unset RANK`\n"
    )


def test_progress_is_kept_where_the_launcher_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("TPX_RUN_DIR", str(tmp_path))
    announce(tmp_path / "progress")
    writer = Worker("cpu").progress()
    writer.update("load", 1, 2, 2)
    assert (tmp_path / "progress/0").read_bytes().startswith(b'["load", 1, 2, 2, ')


def test_a_process_by_itself_leaves_no_records_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("TPX_RUN_DIR", raising=False)
    writer = Worker("cpu").progress()
    writer.update("load", 1, 2, 2)
    writer.close()
    assert not list(tmp_path.iterdir())


def test_errors_have_the_types_that_are_promised():
    assert issubclass(LaunchError, TpxError)
    assert issubclass(RequestError, TpxError)
