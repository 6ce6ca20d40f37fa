"""Memory of the host, and of the control groups that this process is in."""

from __future__ import annotations

import pytest
from machines import GB, job, needs

from tpx.launch import room
from tpx.launch.checks import check_memory
from tpx.launch.needs import PINNED, host_needs
from tpx.plan.device import CPU, DEVICES
from tpx.read.pipeline import ON_GPU


def test_a_rank_pins_at_least_what_is_counted_on():
    assert PINNED <= ON_GPU.most * ON_GPU.buffers <= 4 * PINNED


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 100 GB, whose control groups a test writes."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 200000000 kB\nMemAvailable: 100000000 kB\n")
    monkeypatch.setattr(room, "PROC", proc)
    monkeypatch.setattr(room, "CGROUPS", groups)

    def write(line: str, *folders: tuple[str, dict[str, str]]) -> None:
        (proc / "self" / "cgroup").write_text(f"9:pids:/x\n{line}\n")
        for name, files in folders:
            (groups / name).mkdir(parents=True, exist_ok=True)
            for file, text in files.items():
                (groups / name / file).write_text(text)

    return write


def v1(limit: int, used: int, cache: int) -> dict[str, str]:
    stat = f"cache 1\ntotal_inactive_file {cache}\ntotal_active_file 0\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n",
            "memory.stat": stat}  # fmt: skip


def v2(limit: int | str, used: int, cache: int) -> dict[str, str]:
    stat = f"anon 7\ninactive_file {cache}\nactive_file 0\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def test_without_a_limit_the_machine_has_what_it_has(machine):
    machine("4:memory:/", ("memory", v1(2**63 - 4096, 5 * GB, 0)))
    assert room.memory_room() == (102_400_000_000, "this machine")


def test_a_limit_of_version_1_counts_without_what_the_kernel_can_drop(machine):
    machine("4:cpu,memory:/job", ("memory/job", v1(8 * GB, 5 * GB, 3 * GB)))
    assert room.memory_room() == (6 * GB, "control group `/job` with its limit of 8,000,000,000 "
                                  "bytes")  # fmt: skip


def test_a_limit_of_version_2_counts_and_the_tightest_of_those_above(machine):
    machine("0::/a/b", ("a/b", v2("max", 1, 0)), ("a", v2(4 * GB, 3 * GB, GB)), ("", {}))
    found = room.memory_room()
    assert found is not None
    assert found == (2 * GB, "control group `/a` with its limit of 4,000,000,000 bytes")


def test_a_path_of_the_host_inside_a_container_leaves_the_mounted_group(machine):
    machine("0::/kubepods/pod1/x", ("", v2(GB, 2 * GB, 0)))
    assert room.memory_room() == (0, "control group `/` with its limit of 1,000,000,000 bytes")


def test_this_process_finds_its_own_memory():
    found = room.memory_room()
    assert found is not None
    assert 0 < found.free < 2**50


def test_on_a_cpu_the_host_holds_the_weights_on_a_gpu_what_is_pinned():
    assert host_needs(needs(3 * GB, 4 * GB), CPU) == (7 * GB, 9 * GB)
    assert host_needs(needs(3 * GB), DEVICES["h100"]) == (2**26, 2**26 + 1_500_000_000)


@pytest.mark.parametrize(("limit", "state", "said"), [
    (6, "fault", "6.00 GB free on control group `/job` with its limit of 6,000,000,000 bytes, and "
     "2 ranks need 7.00 GB to load"),
    (8, "doubt", "8.00 GB free on control group `/job` with its limit of 8,000,000,000 bytes, and "
     "2 ranks need about 9.00 GB to load"),
    (9, "ok", "9.00 GB free on control group `/job` with its limit of 9,000,000,000 bytes, and "
     "2 ranks need about 9.00 GB"),
])  # fmt: skip
def test_memory_that_does_not_suffice(machine, limit, state, said):
    machine("4:memory:/job", ("memory/job", v1(limit * GB, 0, 0)))
    [found] = check_memory(job(needs=needs(3 * GB, 4 * GB)))
    assert (found.state, found.said) == (state, said)


# GPUs
