"""Counting GPUs as CUDA would, without it."""

from __future__ import annotations

import pytest
import torch

from tpx.launch import devices
from tpx.launch.devices import count_gpus, count_visible

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


def test_this_machine_has_as_many_as_torch_sees():
    assert count_gpus() == torch.cuda.device_count()
