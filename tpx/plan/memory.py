"""Bytes that a rank holds: weights exactly, from headers, and KV cache as the model's layers ask.

Counts through logical dimensions, layers of equal shape at once, so that a planner can weigh
hundreds of meshes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..families.layout import Dim, Layout
from ..families.spec import ModelSpec
from ..families.steps import ITEM_BYTES, Cut
from ..index import DTYPE_BITS, CheckpointIndex


@dataclass(frozen=True, slots=True)
class Weights:
    """How many parameters there are of each (dims, bits an element, logical dimensions)."""

    shapes: dict[tuple[tuple[Dim, ...], int], int]

    @classmethod
    def of(cls, layout: Layout, index: CheckpointIndex) -> Weights:
        found: Counter[tuple[tuple[Dim, ...], int]] = Counter()
        for parameter in layout.parameters.values():
            if parameter.tied_to is None:
                dtype = index.tensors[parameter.sources[0].tensor].dtype
                found[parameter.dims, DTYPE_BITS[dtype]] += 1
        return cls(dict(found))

    def nbytes(self, cuts: Mapping[str, Cut], layout: Layout) -> int:
        """Bytes of all parameters for a rank with these cuts."""
        return sum(
            count * bits * prod(_local(dim, cuts, layout) for dim in dims) // 8
            for (dims, bits), count in self.shapes.items()
        )

    def replicated(self, cuts: Mapping[str, Cut]) -> float:
        """The share of all bytes that lie in parameters which no axis cuts."""
        total = whole = 0
        for (dims, bits), count in self.shapes.items():
            size = count * bits * prod(dim.size for dim in dims)
            total += size
            if all(not dim.logical or cuts[dim.logical].axis is None for dim in dims):
                whole += size
        return whole / total


def _local(dim: Dim, cuts: Mapping[str, Cut], layout: Layout) -> int:
    if not dim.logical:
        return dim.size
    return dim.size * cuts[dim.logical].size // layout.dims[dim.logical].size


def kv_bytes(
    spec: ModelSpec, kv_heads: int, context: int, sequences: int, dtype: str | None = None
) -> int:
    """KV cache of `sequences` of `context` tokens on a rank that holds `kv_heads` of the heads.

    A sliding layer keeps its window and no more. In the compute dtype.
    """
    window = min(context, spec.sliding_window)
    tokens = sum(context if kind == "full_attention" else window for kind in spec.layer_types)
    return 2 * tokens * sequences * kv_heads * spec.head_dim * ITEM_BYTES[dtype or spec.dtype]
