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
KNOBS = ("temperature", "top_k", "top_p")
ALIGNMENT = 16  # bytes; kernels read whole vectors


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
    positions = [np.arange(chunk.start, chunk.stop) for chunk in chunks]
    full = [chunk.request.full for chunk in chunks]
    sliding = [chunk.request.sliding for chunk in chunks]
    ids = [np.array(c.request.tokens(c.start, c.stop), dtype=np.int64) for c in chunks]
    rows = np.array(wanted(chunks), dtype=np.int64)
    long = joined(ids), joined(positions), slots(positions, full), slots(positions, sliding), rows
    starts = [0, *accumulate(chunk.size for chunk in chunks)]
    lengths = [chunk.stop for chunk in chunks]
    short = starts, lengths, table(chunks, full), table(chunks, sliding)
    tensors = moved([*long, *(np.array(x, dtype=np.int32) for x in short)], device)
    ids_T, positions_T, slots_T, sliding_T, at, starts_B, lengths_B, full_BN, sliding_BN = tensors
    return Batch(
        ids_T=ids_T,
        positions_T=positions_T,
        starts_B=starts_B,
        lengths_B=lengths_B,
        slots_T=(slots_T, sliding_T),
        tables_BN=(full_BN, sliding_BN),
        logits_at=at,
        longest=longest,
        decode=decode,
    )


def moved(parts: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """As tensors on the device: in one copy, for which the host does not wait."""
    if device.type == "cpu":
        return [torch.from_numpy(part) for part in parts]
    ends = [*accumulate(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts)]
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    places = [slice(end, end + part.nbytes) for end, part in zip([0, *ends], parts, strict=False)]
    for place, part in zip(places, parts, strict=True):
        host.numpy()[place] = part.reshape(-1).view(np.uint8)
    data = host.to(device, non_blocking=True)
    kinds = [torch.from_numpy(part[:0]).dtype for part in parts]
    return [
        data[place].view(kind).view(part.shape)
        for place, kind, part in zip(places, kinds, parts, strict=True)
    ]


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


def make_draws(drawing: Sequence[Chunk], device: torch.device) -> Draws:
    """The position of a draw is that of the token it yields."""
    requests = [chunk.request for chunk in drawing]
    draws = [0.0 if r.temperature == 0 else uniform(r.seed, r.length) for r in requests]
    temperature, top_k, top_p = ([getattr(r, name) for r in requests] for name in KNOBS)
    reals = (np.array(values, dtype=np.float64) for values in (temperature, top_p, draws))
    temperature_B, top_p_B, u_B, top_k_B = moved([*reals, np.array(top_k, np.int64)], device)
    any_top_k, any_top_p = any(k > 0 for k in top_k), any(p < 1 for p in top_p)
    return Draws(temperature_B, top_k_B, top_p_B, u_B, any_top_k, any_top_p)
