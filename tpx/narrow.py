"""A model made small for a trial: narrow, with random values, and a batch made by hand.

What decides who sends what to whom stays: mesh, layers, heads, experts, top-k, and whether each cut
is even. Knows no rank and no collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, KVCache
from .engine.blocks import GONE, pages_for
from .families.spec import ModelSpec
from .plan.buffers import PAGE
from .plan.prepare import Prepared

ROWS = 64  # of a narrow vocabulary on each rank


def narrow_sizes(
    prepared: Prepared, hidden: int, head_dim: int, rows: int | None
) -> dict[str, Any]:
    """Smaller sizes under config.json's names, which the plan cuts as it cuts the model's own.

    hidden: a multiple of 32, so that MXFP4 blocks fit. rows: of the vocabulary on each rank; None:
    the vocabulary keeps its size.
    """
    spec, mesh, inner = prepared.spec, prepared.plan.mesh, prepared.layout.dims["I"]
    units = min(inner.units, mesh.etp + inner.units % mesh.etp)
    sizes = {"hidden_size": hidden, "head_dim": head_dim, "intermediate_size": units * inner.unit}
    if rows is not None:
        fewer = rows * mesh.tp + spec.vocab_size % mesh.tp
        sizes["vocab_size"] = min(spec.vocab_size, fewer)
    return sizes


def draw_values(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fills a parameter: packed weights with any code and scales near 1/64, others around 0."""
    if tensor.dtype == torch.uint8:
        low, high = (119, 124) if name.endswith("_scales") else (0, 256)
        tensor.random_(low, high, generator=generator)
    else:
        tensor.normal_(0, 0.2, generator=generator)


def make_batch(
    ids: Sequence[Sequence[int]], past: int, longest: int | None = None, all_logits: bool = False
) -> Batch:
    """Sequences of `past` cached tokens each, which go on with `ids`; each owns pages in order.

    longest: most tokens of any rank, by default those given. all_logits: of every row, else of each
    sequence's last. Every sequence gets a token; a batch of one each decodes if there is a past.
    """
    lengths = [len(new) for new in ids]
    assert min(lengths, default=1) > 0, f"{lengths=}"
    starts = [0, *accumulate(lengths)]
    width = pages_for(past + max(lengths, default=0))
    positions = [past + i for new in ids for i in range(len(new))]
    owner = [b for b, new in enumerate(ids) for _ in new]
    slots = torch.tensor(
        [b * width * PAGE + at for b, at in zip(owner, positions, strict=True)], dtype=torch.int64
    )
    used = [pages_for(past + length) for length in lengths]
    rows = [[b * width + j if j < used[b] else GONE for j in range(width)] for b in range(len(ids))]
    table = torch.tensor(rows, dtype=torch.int32).reshape(len(ids), width)
    last = [stop - 1 for stop in starts[1:]]
    return Batch(
        ids_T=torch.tensor(list(chain(*ids)), dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        starts_B=torch.tensor(starts, dtype=torch.int32),
        lengths_B=torch.tensor([past + n for n in lengths], dtype=torch.int32),
        slots_T=(slots, slots),
        tables_BN=(table, table),
        logits_at=torch.tensor(list(range(starts[-1])) if all_logits else last, dtype=torch.int64),
        longest=starts[-1] if longest is None else longest,
        decode=past > 0,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    def move(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(move(one) for one in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return Batch(*(move(value) for value in batch))  # type: ignore[arg-type]


def make_caches(
    spec: ModelSpec, kv_heads: int, sequences: int, length: int, dtype: torch.dtype,
    device: torch.device,
) -> list[KVCache]:  # fmt: skip
    """For make_batch's sequences of at most `length` tokens, past and new."""
    size = (sequences * pages_for(length), PAGE, kv_heads, spec.head_dim)

    def zeros() -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return [KVCache(zeros(), zeros()) for _ in range(spec.num_hidden_layers)]
