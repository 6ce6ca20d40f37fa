"""Speeds of devices, and of the libraries on them: each with its source.

Structure is fact and speed is an estimate: no other file holds a figure of hardware.
A device without speeds is planned for by memory alone.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import PlanError, did_you_mean


class Figure(NamedTuple):
    """value: bytes a second, operations a second, bytes or seconds, as `unit` says."""

    value: float
    unit: str
    source: str


class Device(NamedTuple):
    """read: of its memory. matmul: bf16, dense. memory: bytes. operation: to start one. host: until
    a count has come to the host. intra, inter: bytes a second that one rank sends inside a node and
    to another one. start, step, hop: seconds of a collective before the first byte, for each step
    to another rank of the node, and for each step to another node. files: bytes a second that one
    rank reads of files in the page cache. band: the share of the device's time by which a run may
    be faster, and slower. backend: of torch's process groups."""

    name: str
    backend: str
    read: Figure | None
    matmul: Figure | None
    memory: Figure | None
    libraries: Figure
    operation: Figure
    host: Figure
    intra: Figure
    inter: Figure
    start: Figure
    step: Figure
    hop: Figure
    files: Figure
    band: tuple[float, float]

    def figures(self) -> dict[str, Figure]:
        return {k: v for k, v in self._asdict().items() if isinstance(v, Figure)}


AIC = "NVIDIA aiconfigurator's tables, H100 SXM"
SHEET = "NVIDIA's data sheet: NVLink 4, 450 GB/s each way, of which NCCL moves about 80%"
NIC = "one 400 Gb/s port a GPU, of which about 80% is moved"


def _hopper(name: str, read: Figure, matmul: Figure, memory: float) -> Device:
    return Device(
        name=name,
        backend="nccl",
        read=read,
        matmul=matmul,
        memory=Figure(memory, "B", "nvidia-smi"),
        libraries=Figure(1.0e9, "B", "CUDA's context 0.6 GB, NCCL 0.4 GB (aiconfigurator)"),
        operation=Figure(3e-6, "s", "aiconfigurator: 3 us an operation"),
        host=Figure(30e-6, "s", "a copy to the host and back: 20 to 50 us a layer"),
        intra=Figure(360e9, "B/s", SHEET),
        inter=Figure(40e9, "B/s", NIC),
        start=Figure(5.3e-6, "s", f"{AIC}: all-reduce of 8 kB on 2, 4, 8 ranks 6.8, 10, 16 us"),
        step=Figure(0.77e-6, "s", f"{AIC}: the slope of the same three"),
        hop=Figure(10e-6, "s", "aiconfigurator: 10 us point to point"),
        files=Figure(7.1e9, "B/s", "InstantTensor's report: 8 H200 read 56.9 GB/s from memory"),
        # Published times of experts are 0.9 to 3.6 times these floors, 1.7 in the median, and a
        # published step 1.6 times: tests/test_plan_cost.py has them.
        band=(0.1, 1.5),
    )


GLOO = "measured 2026-11-24: gloo of torch 2.13.0, two ranks on two cores; an order of magnitude"
CPU = Device(
    name="cpu",
    backend="gloo",
    read=None,  # the reference operations' speed is not the memory's
    matmul=None,
    memory=None,
    libraries=Figure(0.3e9, "B", "torch's own, resident"),
    operation=Figure(0.0, "s", "not known"),
    host=Figure(0.0, "s", "the host is the device"),
    intra=Figure(1e9, "B/s", GLOO),
    inter=Figure(1e9, "B/s", "10 Gb/s Ethernet, about 80% of it"),
    start=Figure(150e-6, "s", GLOO),
    step=Figure(100e-6, "s", GLOO),
    hop=Figure(60e-6, "s", "a round trip of TCP"),
    files=Figure(8e9, "B/s", "measured 2026-11: 16 GB/s on two cores, 8 threads, 4 MiB a read"),
    band=(0.5, 2.0),
)

DEVICES: dict[str, Device] = {
    "h100": _hopper(
        "h100",
        Figure(3.02e12, "B/s", "measured 2026-11, torch 2.11.0: a copy in memory, both ways"),
        Figure(798e12, "1/s", "measured 2026-11, torch 2.11.0: 8192 x 8192 x 8192, bf16"),
        81_559 * 2**20,
    ),
    "h200": _hopper(
        "h200",
        Figure(4.3e12, "B/s", "measured 2026-10, torch 2.11.0: a copy in memory, both ways"),
        Figure(788e12, "1/s", "measured 2026-10, torch 2.11.0: 8192 x 8192 x 8192, bf16"),
        143_771 * 2**20,
    ),
    "cpu": CPU,
}


def find_device(word: str) -> Device:
    """By the name that a user types. Raises PlanError."""
    if word not in DEVICES:
        raise PlanError(f"`--device {word}` is unknown", did_you_mean(word, DEVICES))
    return DEVICES[word]


def device_of(product: str, memory: int | None = None) -> Device:
    """By the name that a driver gives, with the memory that it says; one without speeds if that
    product's are not known."""
    words = product.lower()
    known = next((device for name, device in DEVICES.items() if name in words), None)
    if any(other in words for other in ("pcie", "nvl")):  # slower memory, fewer links
        known = None
    device = known or DEVICES["h100"]._replace(name=product, read=None, matmul=None, memory=None)
    if memory is None:
        return device
    return device._replace(memory=Figure(memory, "B", "the driver"))
