"""What `auto` plans for when this machine starts the ranks: its GPUs and their links."""

from __future__ import annotations

from collections.abc import Mapping

from ..plan.device import CPU, device_of
from ..plan.topology import Topology
from ..plan.wants import Wants
from .devices import smallest_gpu
from .links_file import find_links


def wants_here(
    device: str, nodes: int, nproc: int, batch: int | None, environ: Mapping[str, str]
) -> Wants:
    """device: "cuda" or "cpu". batch: sequences, where they are known. A GPU holds no more than it
    has; what the CPU's memory allows is left to the user."""
    gpu = smallest_gpu() if device == "cuda" else None
    found = device_of("a GPU of unknown speed") if gpu is None else device_of(gpu.name, gpu.memory)
    if device == "cpu":
        found = CPU
    memory = None if gpu is None else gpu.memory
    links = find_links(found, Topology(nodes, nproc), environ=environ)
    return Wants(nodes * nproc, memory, batch=batch, links=links)
