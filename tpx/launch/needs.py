"""What the ranks of a checked plan need of memory, each by itself: exact where it says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..plan.device import CPU, Device

if TYPE_CHECKING:
    from ..plan.prepare import Prepared

PINNED = 64 * 2**20  # bytes of the host that a rank locks at least while it loads onto a GPU
HOST_OF_A_GPU = int(1.5e9)  # bytes of the host that torch and CUDA hold, about


class Need(NamedTuple):
    """Bytes of one rank. weights: exact, as the checkpoint stores them. work: logits, activations
    and the cache of one token, partly estimated. libraries: estimated."""

    rank: int
    weights: int
    work: int
    libraries: int

    @property
    def total(self) -> int:
        return self.weights + self.work + self.libraries


def needs_of(prepared: Prepared, ranks: Sequence[int], device: Device) -> list[Need]:
    """The least with which a rank can generate at all: a longer context needs more."""
    from ..plan.explain import explain

    libraries = int(device.libraries.value)
    found = {
        rank: Need(rank, each.memory.weights, each.memory.total - each.memory.weights, libraries)
        for each in explain(prepared, 1, 1).alike
        for rank in each.ranks
    }
    return [found[rank] for rank in ranks]


def host_needs(needs: Sequence[Need], device: Device) -> tuple[int, int]:
    """-> bytes of this machine's own memory that these ranks take: surely, and by estimate."""
    if device.backend == CPU.backend:
        return sum(need.weights for need in needs), sum(need.total for need in needs)
    return PINNED * len(needs), (PINNED + HOST_OF_A_GPU) * len(needs)
