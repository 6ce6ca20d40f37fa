"""Turns the scheduler's chunks into the tensors of a forward pass and of a draw."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..batch import Batch
from ..ops.sample import uniform
from ..plan.buffers import PAGE
from .blocks import GONE, pages_for
from .scheduler import Chunk

Numbers = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """What `ops.sample` takes, a row for each chunk that draws."""

    temperature_B: torch.Tensor
    top_k_B: torch.Tensor
    top_p_B: torch.Tensor
    u_B: torch.Tensor
    any_top_k: bool
    any_top_p: bool


def make_batch(chunks: Sequence[Chunk], longest: int, decode: bool, device: torch.device) -> Batch:
    """Chunks one after another, in order; [] gives a batch of no token.

    longest, decode: as all ranks agreed, see Batch. logits_at: the last row of a chunk that draws,
    every row of a request that keeps all logits.
    """

    def integers(values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)

    positions = [np.arange(chunk.start, chunk.stop) for chunk in chunks]
    full = [chunk.request.full for chunk in chunks]
    sliding = [chunk.request.sliding for chunk in chunks]
    return Batch(
        ids_T=integers([t for c in chunks for t in c.request.tokens(c.start, c.stop)]),
        positions_T=integers(joined(positions)),
        starts_B=integers([0, *accumulate(chunk.size for chunk in chunks)], torch.int32),
        lengths_B=integers([chunk.stop for chunk in chunks], torch.int32),
        slots_T=(integers(slots(positions, full)), integers(slots(positions, sliding))),
        tables_BN=(
            integers(table(chunks, full), torch.int32),
            integers(table(chunks, sliding), torch.int32),
        ),
        logits_at=integers(wanted(chunks)),
        longest=longest,
        decode=decode,
    )


def joined(parts: list[Numbers]) -> Numbers:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def slots(positions: list[Numbers], pages: list[list[int]]) -> Numbers:
    """Where each token's key and value go."""
    return joined(
        [
            np.asarray(owned)[at // PAGE] * PAGE + at % PAGE
            for at, owned in zip(positions, pages, strict=True)
        ]
    )


def table(chunks: Sequence[Chunk], pages: list[list[int]]) -> Numbers:
    """[B, N]; a request's own pages, cut or filled up to those of the longest sequence."""
    width = max((pages_for(chunk.stop) for chunk in chunks), default=0)
    rows = np.full((len(pages), width), GONE)
    for row, owned in zip(rows, pages, strict=True):
        row[: len(owned)] = owned[:width]
    return rows


def wanted(chunks: Sequence[Chunk]) -> list[int]:
    """The rows whose logits are used."""
    rows: list[int] = []
    row = 0
    for chunk in chunks:
        if chunk.request.all_logits:
            rows += range(row, row + chunk.size)
        elif chunk.draws:
            rows.append(row + chunk.size - 1)
        row += chunk.size
    return rows


def make_draws(drawing: list[Chunk], device: torch.device) -> Draws:
    """The position of a draw is that of the token it yields."""
    requests = [chunk.request for chunk in drawing]
    draws = [0.0 if r.temperature == 0 else uniform(r.seed, r.length) for r in requests]

    def reals(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    return Draws(
        reals([request.temperature for request in requests]),
        torch.tensor([request.top_k for request in requests], dtype=torch.int64, device=device),
        reals([request.top_p for request in requests]),
        reals(draws),
        any(request.top_k > 0 for request in requests),
        any(request.top_p < 1 for request in requests),
    )
