"""`tpx doctor --ranks N`: a self-test between real ranks, and what doctor says beside kernels."""

from __future__ import annotations

import json
import re

import pytest
import torch
from launching import environment, tpx
from ranks import ranks
from torch import distributed

from tpx import selftest
from tpx.cli import doctor, doctor_ranks
from tpx.cli.main import main
from tpx.comm import Group, Groups
from tpx.launch.gpus import GpuState, Holder
from tpx.launch.hardware import Hardware
from tpx.launch.room import Room
from tpx.mesh import Mesh
from tpx.ops.cpu.build import COMPILERS
from tpx.plan.device import CPU

GB = 10**9


def test_the_compilers_are_those_that_are_tried():
    assert doctor.COMPILERS == COMPILERS


class Broken(Group):
    """One rank adds up wrong, and sends its rows to the wrong ranks."""

    def all_reduce(self, x, name):
        return super().all_reduce(x, name) + (self.rank == 1)

    def all_to_all(self, x, send, receive, name):
        return super().all_to_all(x, send, receive, name).flip(0)


def judge(file: str) -> list[str]:
    """What is wrong with a group that is; of one that works the whole self-test, small."""
    selftest.SIZES = selftest.SIZES[:1]
    selftest.main([file])
    groups = Groups(Mesh(tp=2, edp=2), distributed.get_rank(), torch.device("cpu"))
    broken = groups["tp"]
    broken.__class__ = Broken
    found = selftest.wrong(broken)
    groups.close()
    return found


def test_collectives_that_are_wrong_are_found(tmp_path):
    assert ranks(2).run(judge, str(tmp_path / "found")) == [["all_reduce", "all_to_all"]] * 2
    found = json.loads((tmp_path / "found").read_text())
    assert found["wrong"] == []
    assert [(op, nbytes) for op, nbytes, _ in found["points"]] == [
        ("all_reduce", 65536), ("all_to_all", 65536)
    ]  # fmt: skip
    assert all(seconds > 0 for _, _, seconds in found["points"])


def test_speeds_are_what_a_rank_sends(capsys):
    points = [("all_reduce", 2**20, 0.001), ("all_to_all", 2**20, 0.001)]
    doctor_ranks.draw({"points": points}, Hardware("cpu", 4, (1, 1)), print)
    lines = capsys.readouterr().out.splitlines()
    first, titles, row, stated, *rest = lines
    assert first == "self-test of 4 ranks on cpu over gloo, GB/s that each sends"
    assert titles.split() == ["put", "in", "all-reduce", "all-to-all"]
    assert row.split() == ["1.05", "MB", "1.57", "0.79"]  # 2 * 3/4 and 3/4 of 1.05
    assert stated.split()[:2] == ["stated", f"{CPU.intra.value / 1e9:.2f}"]
    assert " ".join([stated[26:], *(line.strip() for line in rest)]) == CPU.intra.source
    assert max(map(len, lines)) <= 80


def test_wrong_numbers_are_a_fault(capsys, monkeypatch):
    def found(ranks, device, say):
        return 1, "all-reduce between 2 ranks gives wrong numbers"

    monkeypatch.setattr(doctor_ranks, "test_ranks", found)
    assert main(["doctor", "--ranks", "2"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "fault: all-reduce between 2 ranks gives wrong numbers"


@pytest.mark.parametrize(("words", "message", "hint"), [
    (["--ranks", "1"], "`--ranks 1` cannot send anything", "use `--ranks 2` or more"),
    (["--device", "cpu"], "`--device cpu` is of the ranks of a self-test", "add `--ranks 2`"),
    (["--ranks", "2", "--device", "tpu"], "`--device tpu` is unknown", "use `cpu` or `cuda`"),
])  # fmt: skip
def test_mistakes_say_what_to_type(capsys, words, message, hint):
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err == f"error: {message}\n\nhint: {hint}\n"


def test_what_is_said_of_a_machine_with_gpus(monkeypatch):
    states = [
        GpuState(0, "", "H100", 80 * GB, 5 * GB, (Holder(7, 75 * GB, "python train.py"),), 1),
        GpuState(1, "", "H100", 80 * GB, 79 * GB),
    ]
    monkeypatch.setattr(doctor, "gpu_states", lambda: states)
    monkeypatch.setattr(doctor, "joints", lambda numbers: {(0, 1): "host"})
    monkeypatch.setattr(doctor, "library_versions", lambda backend: {"nccl": "2.28"})
    monkeypatch.setattr(doctor, "memory_room", lambda: Room(9 * GB, "control group `/job`"))
    monkeypatch.setattr(doctor, "shared_memory", lambda: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert list(doctor.machine_lines(True))[:-1] == [
        "nccl     2.28",
        "compiler none: the CPU runs the torch references, several times slower",
        "GPU 0    5.00 GB of 80.00 GB free, NUMA node 1; process 7 (`python train.py`) holds "
        "75.00 GB",
        "GPU 1    79.00 GB of 80.00 GB free",
        "links    GPUs 0 and 1: no access to each other's memory (1 such pairs)",
        "memory   9.00 GB free on control group `/job`",
        "/dev/shm missing",
    ]


@pytest.mark.soak
def test_real_ranks_measure_themselves(tmp_path):
    done = tpx("doctor", "--ranks", 2, "--device", "cpu", cwd=tmp_path,
               env=environment(XDG_CACHE_HOME=str(tmp_path)))  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    at = lines.index("self-test of 2 ranks on cpu over gloo, GB/s that each sends")
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[at + 2 : -1]]
    assert [row[0] for row in rows][:2] == ["65.54 kB", "1.05 MB"]
    assert all(0 < float(speed) < 1000 for row in rows for speed in row[1:])
    assert not list(tmp_path.iterdir())
