"""Prints, as JSON, the kernels that the packages' self tests launch, by what an H100 would be told.

In a process of its own, which has the packages on its path: that of the tests interprets kernels,
and here a CPU passes for a GPU.
"""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import torch
import tpx_attention
import tpx_moe
import triton

from tpx.kernels.compiling import Job, noting

NAME, CPU = "NVIDIA H100 80GB HBM3", torch.device("cpu")
TARGET = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


def pretend() -> None:
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGET,
    )
    triton.runtime.driver.set_active(driver)
    torch.cuda.get_device_name = lambda device: NAME
    device = importlib.import_module("tpx_moe.device")
    device.available = lambda *_: True
    device.mode = lambda *_: device.Mode(True, True, True)
    device.names = lambda *_: (NAME,)
    for name in ("attention", "linear", "sample"):
        module = importlib.import_module(f"tpx_attention.{name}")
        vars(module).update(available=lambda *_: True, capability=lambda *_: (9, 0))
        vars(module).update(dependent=lambda *_: True, plain=lambda *_: False)


def told(job: Job) -> dict[str, Any]:
    """kernel, and its constants by name."""
    found = json.loads(job)
    said = json.loads(found["data"])
    names = list(said["signature"])
    places = (names[place[0]] for place in said["constant_keys"])
    return {"kernel": found["kernel"], **dict(zip(places, said["constant_vals"], strict=True))}


if __name__ == "__main__":
    pretend()
    with noting() as noted:
        given = tpx_attention.self_test(CPU, ((5120, 2880), (2880, 4096)), judge=False)
        trial = tpx_moe.self_test(CPU, 2880, 2880, judge=False)
    assert given == {}
    assert not trial.safe
    print(json.dumps([told(job) for job in noted.jobs]))
