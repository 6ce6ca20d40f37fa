"""One allocation for all that a rank holds: each parameter is a typed view of its slot."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from ..plan.forms import ALIGNMENT, NOTHING, arena_nbytes, slots
from ..plan.spans import Span
from ..plan.types import RankPlan

# safetensors' names; one byte holds whole elements in each of them.
DTYPES = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


class Held(NamedTuple):
    """A parameter: its byte in the arena, its shard's shape, and what it is stored and held in."""

    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype
    final: torch.dtype


class Arena:
    """The memory of a rank's parameters, not yet filled.

    dtype: what all but uint8 is held in. packed: bytes of the parameters that a module packs after
    they are read. Tied parameters have no slot.
    """

    def __init__(
        self,
        rank_plan: RankPlan,
        dtype: torch.dtype,
        device: torch.device,
        packed: Mapping[str, int] = NOTHING,
    ):
        self.device = device
        self.slots = slots(rank_plan, str(dtype).removeprefix("torch."), packed)
        self.held: dict[str, Held] = {}
        for name, slot in self.slots.items():
            shape, stored = rank_plan.shards[name].shape, DTYPES[rank_plan.shards[name].dtype]
            final = stored if stored == torch.uint8 else dtype
            self.held[name] = Held(slot.offset, shape, stored, final)
        nbytes = -(-arena_nbytes(self.slots) // ALIGNMENT) * ALIGNMENT
        self.data = empty(nbytes, device)
        self._typed = {final: self.data.view(final) for final in (dtype, torch.uint8)}

    def slot(self, name: str) -> torch.Tensor:
        """All bytes of the parameter's slot: uint8 [slot.nbytes]."""
        offset, nbytes = self.slots[name]
        return self.data[offset : offset + nbytes]

    def flat(self, name: str) -> torch.Tensor:
        """The parameter before it is packed, in the dtype it is held in: [numel]."""
        offset, shape, _, final = self.held[name]
        return self._typed[final].narrow(0, offset // final.itemsize, prod(shape))

    def view(self, name: str) -> torch.Tensor:
        """As `flat`, in the shard's shape."""
        return self.flat(name).view(self.held[name].shape)

    def places(self, read: Span) -> list[tuple[int, int]] | None:
        """(byte of the arena, bytes) of the read's pieces in order, those that touch as one, where
        all of its bytes are kept as they are, piece after piece; else None."""
        found, end = list[tuple[int, int]](), 0
        for name, source, target, nbytes, rows, _, _ in read.copies:
            offset, _, stored, final = self.held[name]
            if rows > 1 or source != end or stored != final:
                return None
            if found and sum(found[-1]) == offset + target:
                found[-1] = found[-1][0], found[-1][1] + nbytes
            else:
                found.append((offset + target, nbytes))
            end += nbytes
        return found if end == read.nbytes else None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a module packs its parameters in. scratch: uint8, as large as the largest of the slots
    that are packed, and the same for every module."""

    arena: Arena
    module: str
    scratch: torch.Tensor

    def slot(self, leaf: str) -> torch.Tensor:
        """The bytes of the module's own parameter of this name: uint8 [slot.nbytes]."""
        return self.arena.slot(f"{self.module}.{leaf}" if self.module else leaf)


def empty(nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes]. On a CPU pages of its own, huge ones where the kernel has them: filling
    small pages for the first time takes three times as long as the reading."""
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
