"""The values of planning: Plan (what a file says) and RankPlan (what one rank holds)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ..families.layout import Range
from ..families.spec import ModelSpec
from ..families.steps import Collective, Cut, DispatchName
from ..index import TensorMeta
from ..mesh import Mesh

STYLES = ("colwise", "rowwise", "vocab", "expert", "replicate")
MOST_RANKS = 16_384  # of a plan
DISPATCHES = ("auto", "replicated", "gather", "all_to_all")

__all__ = [
    "DISPATCHES",
    "MOST_RANKS",
    "STYLES",
    "Collective",
    "Cut",
    "DispatchName",
    "DispatchPlan",
    "Limits",
    "Part",
    "Plan",
    "RankPlan",
    "Rule",
    "Shard",
]


@dataclass(frozen=True, slots=True)
class Rule:
    """`PATTERN: STYLE` or `PATTERN: {style, dispatch, uneven}`, and the line it stands on.

    line 0: it stands in no file (a plan given as a dict).
    """

    pattern: str
    style: str
    line: int
    dispatch: str = "auto"
    uneven: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan must not exceed; None: no limit, only reported."""

    memory: int | None = None  # bytes of weights and KV cache on a rank
    context: int | None = None  # tokens of a sequence that the KV cache is counted for
    batch: int | None = None  # sequences that the KV cache is counted for
    max_replicated: float | None = None  # share of the weights' bytes, 0 to 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan file, parsed. `path` is what messages call it."""

    path: str
    model: str
    mesh: Mesh
    rules: tuple[Rule, ...]
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a checkpoint tensor that fills a piece of a shard.

    index: for each dimension of the tensor, the ranges read, in order. at: where the part begins
    in the shard (one entry a dimension of the shard; a tensor with fewer dimensions is aligned
    with the last ones).
    """

    meta: TensorMeta
    index: tuple[tuple[Range, ...], ...]
    at: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.index)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's piece of one parameter. `dtype` is the checkpoint's, in safetensors' names.

    parts: empty for a piece of no elements, and for a parameter that shares another's storage
    (`tied_to`), which is read once, under that name.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    style: str
    line: int
    ranges: tuple[tuple[Range, ...], ...]  # of the whole parameter, a dimension each
    add_once: bool = False  # a bias on partial sums over this rank's group: one rank adds it
    tied_to: str | None = None
    device: str = "cpu"

    @property
    def numel(self) -> int:
        return prod(self.shape)


class DispatchPlan(NamedTuple):
    """Which dispatch moves tokens to experts: when any rank prefills, and when all decode."""

    prefill: DispatchName
    decode: DispatchName


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank holds, reads and sends: printable, checked, free of torch.

    cuts: of each logical dimension of the layout, the units that this rank holds.
    owner_E, slot_E: for each expert, the index in the expert group's `ep` axis that holds it, and
    its place among that rank's experts.
    """

    rank: int
    mesh: Mesh
    spec: ModelSpec
    shards: dict[str, Shard]
    cuts: dict[str, Cut]
    dispatch: DispatchPlan
    owner_E: tuple[int, ...]
    slot_E: tuple[int, ...]
