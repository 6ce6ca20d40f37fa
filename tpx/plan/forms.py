"""Where each parameter lies in its rank's arena, in its final form: sizes without torch.

A slot has the size of what runs: uint8 as it is stored, all else in the compute dtype, and where an
operation packs its weights for a kernel, what that operation says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ..families.steps import ITEM_BYTES
from .spans import item_bytes
from .types import RankPlan, Shard

ALIGNMENT = 512  # bytes; of what CUDA's own allocator gives, and of a direct read of any disk
HELD_BYTES = {**ITEM_BYTES, "float64": 8}  # a model may be held in it, to compare others with
NOTHING: Mapping[str, int] = MappingProxyType({})
JOINED = ("q_proj", "k_proj", "v_proj")  # modules whose rows lie one behind the other: one product


class Slot(NamedTuple):
    """Bytes of an arena."""

    offset: int
    nbytes: int


def slots(rank_plan: RankPlan, dtype: str, packed: Mapping[str, int] = NOTHING) -> dict[str, Slot]:
    """A slot for each parameter, in the order in which the files are read; tied ones have none.

    Those of JOINED follow the first of them, without a gap. dtype: what the model computes in, as
    config.json says it. packed: bytes of the parameters that an operation packs after they are
    read; a slot holds what is read, too.
    """
    shards = {name: s for name, s in rank_plan.shards.items() if s.tied_to is None}
    found, end = dict[str, Slot](), 0
    for run in joined(sorted(shards, key=lambda name: file_order(shards[name]))):
        end = -(-end // ALIGNMENT) * ALIGNMENT
        for name in run:
            found[name] = Slot(end, max(final_bytes(shards[name], dtype), packed.get(name, 0)))
            end += found[name].nbytes
    return found


def joined(names: Sequence[str]) -> Iterator[list[str]]:
    """The parameters in their order, those of a run behind the first of it."""
    known = set(names)
    for name in names:
        run = [each for each in joins(name) if each in known]
        if run[0] == name:
            yield run


def joins(name: str) -> list[str]:
    """The parameters that would lie one behind the other with this one, in that order."""
    owner, _, leaf = name.rpartition(".")
    above, _, module = owner.rpartition(".")
    return [f"{above}.{each}.{leaf}" for each in JOINED] if module in JOINED else [name]


def arena_nbytes(slots: Mapping[str, Slot]) -> int:
    """Bytes of the arena that has these slots."""
    return max((slot.offset + slot.nbytes for slot in slots.values()), default=0)


def file_order(shard: Shard) -> tuple[str, int]:
    """The file and the tensor that the shard is read from first."""
    return min(((part.meta.file, part.meta.offset) for part in shard.parts), default=("", 0))


def final_bytes(shard: Shard, dtype: str) -> int:
    """Bytes of the shard as the reference operations take it."""
    return shard.numel * (1 if shard.dtype == "U8" else HELD_BYTES[dtype])


def stored_nbytes(rank_plan: RankPlan) -> int:
    """Bytes that the rank keeps, in the checkpoint's form."""
    return sum(
        shard.numel * item_bytes(shard.dtype)
        for shard in rank_plan.shards.values()
        if shard.tied_to is None
    )
