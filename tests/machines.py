"""A machine for the checks of a job, as it is found."""

from __future__ import annotations

from tpx.launch.checks import Machine
from tpx.launch.needs import Need
from tpx.plan.device import CPU, DEVICES

GB = 10**9


def job(device: str = "cpu", needs=(), gpus=None, nproc: int = 2, apart: bool = False) -> Machine:
    paper = CPU if device == "cpu" else DEVICES["h100"]
    return Machine(device, paper, nproc, nproc, apart, needs, gpus)


def needs(*weights: int) -> list[Need]:
    return [Need(rank, nbytes, 0, GB) for rank, nbytes in enumerate(weights)]
