"""What preflight finds out about a machine, and when it refuses to start ranks on it."""

from __future__ import annotations

import os
import socket
import stat
import sys

import pytest
from machines import GB, job, needs

from tpx.errors import LaunchError
from tpx.launch import checks, devices, gpus, room
from tpx.launch.checks import Check, Machine, check_machine, refuse, warnings
from tpx.launch.gpus import GpuState, Holder, gpu_states, joints
from tpx.launch.needs import Need

UUIDS = ("GPU-aaaa", "GPU-bbbb")
H100 = "NVIDIA H100 80GB HBM3"


class Nvml:
    """Two H100, the first of which another process fills."""

    free = (5 * GB, 79 * GB)
    peer = (0, 1, 0)  # by kind, READ, another and NVLINK: 0 is ok

    def nvmlInit_v2(self):
        return 0

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, i, device):
        device._obj.value = i + 1
        return 0

    def nvmlDeviceGetName(self, device, text, size):
        text.value = H100.encode()
        return 0

    def nvmlDeviceGetUUID(self, device, text, size):
        text.value = UUIDS[device.value - 1].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, device, memory):
        memory._obj.total, memory._obj.free = 80 * GB, self.free[device.value - 1]
        return 0

    def nvmlDeviceGetPciInfo_v3(self, device, pci):
        pci._obj.bus_id = f"00000000:{device.value}B:00.0".encode()
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device, count, listed):
        count._obj.value = 1 if device.value == 1 else 0
        listed[0].pid, listed[0].used = os.getpid(), 75 * GB
        return 0

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, device, count, listed):
        return 3  # not supported

    def nvmlDeviceGetP2PStatus(self, first, second, kind, status):
        status._obj.value = self.peer[kind]
        return 0


@pytest.fixture
def nvml(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Nvml())
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(gpus, "process_name", lambda pid: "python train.py")
    for bus, node in (("0000:1b:00.0", "0"), ("0000:2b:00.0", "-1")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "numa_node").write_text(f"{node}\n")


def test_nvml_says_what_is_free_and_who_holds_the_rest(nvml):
    me = Holder(os.getpid(), 75 * GB, "python train.py")
    first = GpuState(0, UUIDS[0], H100, 80 * GB, 5 * GB, (me,), 0)
    second = GpuState(1, UUIDS[1], H100, 80 * GB, 79 * GB)
    assert gpu_states({}) == [first, second]
    assert gpu_states({"CUDA_VISIBLE_DEVICES": "1,0"}) == [second, first]
    assert gpu_states({"CUDA_VISIBLE_DEVICES": "GPU-b"}) == [second]
    assert gpu_states({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_gpu_that_is_taken_is_refused_with_the_process(nvml):
    found = check_machine(job("cuda", needs(30 * GB, 30 * GB), gpu_states({})), {})
    faults = [check for check in found if check.state == "fault"]
    with pytest.raises(LaunchError) as raised:
        refuse(faults, "strict")
    assert raised.value.message == (
        "GPU 0 has 5.00 GB free of 80.00 GB, and rank 0 needs 31.00 GB, 30.00 GB of them weights: "
        f"process {os.getpid()} (`python train.py`) holds 75.00 GB"
    )
    assert raised.value.hint == (
        f"end it (`kill {os.getpid()}`), or name other GPUs in `CUDA_VISIBLE_DEVICES`"
    )
    assert raised.value.exit_code == 3
    refuse(faults, "warn")
    assert warnings(faults)[0].startswith("warning: GPU 0 has 5.00 GB free of 80.00 GB, and ")
    more = [*faults, Check("x", "fault", "two")]
    with pytest.raises(LaunchError, match="; 1 more: add `--dry-run` to see all\n"):
        refuse(more, "strict")


def test_other_gpus_are_free(nvml):
    states = gpu_states({"CUDA_VISIBLE_DEVICES": "1"})
    assert checks.check_gpu(states[0], Need(0, 70 * GB, 0, GB)) is None
    [found] = checks.check_gpus(job("cuda", needs(70 * GB), states, nproc=1))
    assert found == Check("GPUs", "ok", f"1 {H100}; at least 79.00 GB free of 80.00 GB")
    found = checks.check_gpu(states[0], Need(3, 90 * GB, 0, GB))
    assert found is not None
    assert found.said.startswith("GPU 1 has 79.00 GB free of 80.00 GB, and rank 3 needs 91.00 GB")
    assert found.hint == "cut over more ranks, or use a smaller model"


def test_memory_that_nobody_seems_to_hold_is_held_outside_the_container():
    state = GpuState(0, "", H100, 80 * GB, 5 * GB)
    found = checks.check_gpu(state, Need(0, 30 * GB, 0, GB))
    assert found is not None
    assert found.said.endswith("weights: a process that cannot be seen from here holds the rest")


def test_a_driver_that_says_nothing_is_a_doubt():
    [found] = checks.check_gpus(job("cuda", needs(GB), None, nproc=1))
    assert found == Check(
        "GPUs", "doubt", "neither NVML nor nvidia-smi says how much memory is free",
        "install the driver's tools in this container",
    )  # fmt: skip


SMI = """#!{python}
import sys
if "gpu=" in sys.argv[1]:
    print("GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 5000, 00000000:1B:00.0")
    print("GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, {free}, 00000000:2B:00.0")
else:
    print("GPU-aaaa, 4194999, 76000")
"""


@pytest.fixture
def smi(monkeypatch, tmp_path):
    def write(free: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(SMI.format(python=sys.executable, free=free))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(devices, "NVML", "libnothing.so.1")

    return write


def test_nvidia_smi_stands_in_for_nvml(smi):
    smi("81000")
    assert gpu_states({"CUDA_VISIBLE_DEVICES": "1,0"}) == [
        GpuState(1, "GPU-bbbb", H100, 81559 * 2**20, 81000 * 2**20),
        GpuState(0, "GPU-aaaa", H100, 81559 * 2**20, 5000 * 2**20,
                 (Holder(4194999, 76000 * 2**20, ""),)),
    ]  # fmt: skip


def test_a_gpu_of_which_nothing_is_known_is_not_guessed_at(smi, monkeypatch):
    smi("[N/A]")
    assert gpu_states({}) is None
    monkeypatch.setenv("PATH", "")
    assert gpu_states({}) is None


@pytest.mark.parametrize(("peer", "kind", "state", "said"), [
    ((0, 1, 0), "NVLink", "ok", "2 GPUs reach each other over NVLink"),
    ((0, 1, 5), "PCIe", "ok", "2 GPUs reach each other over PCIe"),
    ((1, 1, 5), "host", "doubt", "GPUs 0 and 1 cannot reach each other's memory"),
])  # fmt: skip
def test_how_gpus_are_joined(nvml, monkeypatch, peer, kind, state, said):
    monkeypatch.setattr(Nvml, "peer", peer)
    assert joints([0, 1]) == {(0, 1): kind}
    [found] = checks.check_joints(job("cuda", (), gpu_states({})))
    assert (found.state, found.said) == (state, said)


# limits


def test_shared_memory_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "shared_memory", lambda: 2**26)
    assert checks.check_shared_memory() == Check(
        "/dev/shm", "doubt", "/dev/shm has 67.11 MB free, and NCCL may need 1.07 GB",
        "start the container with `--shm-size=1g`, or mount a memory volume at /dev/shm",
    )  # fmt: skip
    monkeypatch.setattr(checks, "shared_memory", lambda: 2**31)
    assert checks.check_shared_memory() == Check("/dev/shm", "ok", "2.15 GB free")
    monkeypatch.setattr(room, "SHM", tmp_path / "none")
    monkeypatch.setattr(checks, "shared_memory", room.shared_memory)
    assert checks.check_shared_memory().said == "/dev/shm is missing, which NCCL uses"


def test_limits_of_processes(monkeypatch):
    monkeypatch.setattr(checks, "open_files", lambda: 256)
    monkeypatch.setattr(checks, "locked_memory", lambda: 65536)
    assert checks.check_open_files(8) == Check(
        "open files", "doubt", "a process may open 256 files, and 8 ranks may need 576 each",
        "`ulimit -n 576`",
    )  # fmt: skip
    assert checks.check_locked_memory() == Check(
        "locked memory", "doubt", "a process may lock 65,536 bytes, and InfiniBand needs more",
        "`ulimit -l unlimited`",
    )  # fmt: skip
    monkeypatch.setattr(checks, "open_files", lambda: None)
    assert checks.check_open_files(8) == Check("open files", "ok", "any number")


def test_a_host_name_that_no_other_machine_reaches(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("127.0.1.1", 0))])
    assert checks.check_host_name("cpu", {}) == Check(
        "host name", "fault",
        "this machine's name `node7` is 127.0.1.1, which no other machine reaches",
        "name it in /etc/hosts with an address that the others reach, or set `GLOO_SOCKET_IFNAME`",
    )  # fmt: skip
    assert checks.check_host_name("cuda", {}).state == "doubt"
    said = checks.check_host_name("cpu", {"GLOO_SOCKET_IFNAME": "eth0"})
    assert said == Check("host name", "ok", "GLOO_SOCKET_IFNAME is `eth0`")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("10.0.0.7", 0))])
    assert checks.check_host_name("cpu", {}) == Check("host name", "ok", "`node7` is 10.0.0.7")

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert checks.check_host_name("cpu", {}).said == "this machine's name `node7` has no address"


def test_each_kind_of_job_has_its_checks(nvml, monkeypatch):
    def names(machine: Machine) -> list[str]:
        return [check.name for check in check_machine(machine, {})]

    assert names(job(needs=needs(1))) == ["memory", "open files"]
    assert names(job(apart=True)) == ["open files", "host name"]
    two = job("cuda", needs(1, 1), gpu_states({}), apart=True)
    assert names(two) == ["GPUs", "memory", "links", "/dev/shm", "open files", "host name",
                          "locked memory"]  # fmt: skip
