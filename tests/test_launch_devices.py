"""Counting GPUs as CUDA would, without it."""

from __future__ import annotations

import pytest
import torch

from tpx.launch import devices
from tpx.launch.devices import Gpu, count_gpus, count_visible, smallest_gpu

UUIDS = ["GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3", "GPU-dddd-4"]


@pytest.mark.parametrize(
    ("listed", "count"),
    [
        ("0", 1),
        ("0,1,2,3", 4),
        ("3, 1", 2),
        ("0,9,1", 1),  # CUDA stops at the first device that is not there
        ("-1", 0),
        ("0,-1,1", 1),
        ("1,1", 0),  # and sees none where one is named twice
        ("GPU-cccc-3,0", 2),
        ("GPU-c", 1),
        ("GPU-aa", 0),  # two devices begin so
        ("GPU-zz", 0),
        ("2,GPU-cccc-3", 0),
        ("MIG-1,MIG-2", 2),
        ("none", 0),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(listed, count):
    assert count_visible(listed, UUIDS) == count


def test_an_empty_variable_hides_all_gpus(monkeypatch):
    monkeypatch.setattr(devices, "nvml_uuids", lambda: UUIDS)
    assert count_gpus({}) == 4
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "2"}) == 1


def test_the_drivers_list_stands_in_for_nvml(monkeypatch):
    monkeypatch.setattr(devices, "nvml_uuids", lambda: None)
    monkeypatch.setattr(devices, "driver_count", lambda: 2)
    assert count_gpus({}) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "1,2"}) == 1


class Nvml:
    """Two GPUs as the library tells of them; the driver's answers are written through pointers."""

    gpus = (("NVIDIA H100 80GB HBM3", 80 * 2**30), ("NVIDIA H100 80GB HBM3", 40 * 2**30))

    def nvmlInit_v2(self):
        return 0

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, i, device):
        device._obj.value = i + 1
        return 0

    def nvmlDeviceGetName(self, device, text, size):
        text.value = self.gpus[device.value - 1][0].encode()
        return 0

    def nvmlDeviceGetUUID(self, device, text, size):
        text.value = UUIDS[device.value - 1].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, device, memory):
        memory._obj.total = self.gpus[device.value - 1][1]
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = 9, 0
        return 0


def test_the_gpu_with_the_least_memory_is_named(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Nvml())
    assert smallest_gpu() == Gpu("NVIDIA H100 80GB HBM3", 40 * 2**30, (9, 0))
    assert count_gpus({}) == 2
    monkeypatch.setattr(Nvml, "nvmlDeviceGetMemoryInfo", lambda *_: 3)  # not supported
    assert smallest_gpu() is None


def test_without_nvml_no_gpu_is_named(monkeypatch):
    monkeypatch.setattr(devices, "NVML", "libnothing.so.1")
    assert smallest_gpu() is None


def test_this_machine_has_as_many_as_torch_sees():
    assert count_gpus() == torch.cuda.device_count()
