"""The inputs of a decode step of one shape: numbers written on the host, copied in one go."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..ops.sample import uniform
from ..plan.buffers import PAGE
from .batch import ALIGNMENT
from .request import Request
from .scheduler import Chunk

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of a buffer's parts


class Drawn(NamedTuple):
    """What ops.sample takes, [rows] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    u: Tensor


class Given(NamedTuple):
    batch: Batch
    draws: Drawn


class Inputs:
    """rows, pages: of the shape. most: rows of any shape. Before the first `fill` all sequences are
    of length 0, for which kernels write nothing."""

    def __init__(self, rows: int, pages: int, most: int, device: torch.device):
        self.rows, self.most, self.device = rows, most, device
        layout: Layout = dict.fromkeys(
            ("source", "ids", "positions", "full_slots", "sliding_slots", "top_k"),
            (torch.int64, (rows,)),
        )
        layout |= dict.fromkeys(("temperature", "top_p", "u"), (torch.float64, (rows,)))
        layout["lengths"] = (torch.int32, (rows,))
        layout |= dict.fromkeys(("full_table", "sliding_table"), (torch.int32, (rows, pages)))
        nbytes = sum(_aligned(dtype.itemsize * prod(shape)) for dtype, shape in layout.values())
        self._data = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._at = _views(self._data, layout)
        pin = device.type == "cuda"
        self._hosts = [_Host(nbytes, layout, pin) for _ in "ab"]
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._all = torch.arange(rows, device=device)

    def fill(self, chunks: Sequence[Chunk], sources: Sequence[int]) -> None:
        """sources: rows of the step before whose ids the chunks go on from; -1: the host has it."""
        host = self._hosts[0]
        self._hosts.reverse()
        host.wait()
        for row, (chunk, source) in enumerate(zip(chunks, sources, strict=True)):
            host.put(row, chunk, source, self.most)
        host.repeat_first(len(chunks), self.rows)
        self._data.copy_(host.data, non_blocking=True)
        host.sent()

    def take(self, known: Tensor) -> Given:
        """As tensors on the device. known [2 * most]: ids of the step before; then the given
        ones."""
        at = self._at
        known[self.most : self.most + self.rows].copy_(at["ids"])
        batch = Batch(
            ids_T=known.index_select(0, at["source"]),
            positions_T=at["positions"],
            starts_B=self._starts,
            lengths_B=at["lengths"],
            slots_T=(at["full_slots"], at["sliding_slots"]),
            tables_BN=(at["full_table"], at["sliding_table"]),
            logits_at=self._all,
            longest=self.rows,
            decode=True,
        )
        return Given(batch, Drawn(at["temperature"], at["top_k"], at["top_p"], at["u"]))


class _Host:
    """One set of numbers, page-locked for a GPU. Tables of a row are written again only where the
    request, or how many pages it has, is another."""

    def __init__(self, nbytes: int, layout: Layout, pin: bool):
        self.data = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin)
        self._pin = pin
        self._event: torch.cuda.Event | None = None
        self._at = {name: view.numpy() for name, view in _views(self.data, layout).items()}
        self._written = list[tuple[int, int, int]]()

    def wait(self) -> None:
        """Until what was sent last has arrived."""
        if self._event is not None:
            self._event.synchronize()

    def sent(self) -> None:
        if self._pin:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def put(self, row: int, chunk: Chunk, source: int, most: int) -> None:
        at, request, position = self._at, chunk.request, chunk.start
        known = source < 0
        at["source"][row] = most + row if known else source
        at["ids"][row] = request.tokens(position, position + 1)[0] if known else 0
        at["positions"][row] = position
        at["lengths"][row] = position + 1
        page, offset = divmod(position, PAGE)
        at["full_slots"][row] = request.full[page] * PAGE + offset
        at["sliding_slots"][row] = request.sliding[page] * PAGE + offset
        at["temperature"][row] = request.temperature
        at["top_k"][row], at["top_p"][row] = request.top_k, request.top_p
        draws = request.temperature > 0
        at["u"][row] = uniform(request.seed, position + 1) if draws else 0.0
        self._put_tables(row, request)

    def _put_tables(self, row: int, request: Request) -> None:
        """Pages that left the window stay as they were: nothing reads them."""
        full, sliding = request.full, request.sliding
        wanted = (request.id, request.places, len(full))
        if row < len(self._written) and self._written[row] == wanted:
            return
        self._at["full_table"][row, : len(full)] = full
        self._at["sliding_table"][row, : len(sliding)] = sliding
        self._written[row : row + 1] = [wanted]

    def repeat_first(self, begin: int, end: int) -> None:
        for values in self._at.values():
            values[begin:end] = values[0]
        del self._written[begin:]


def _views(data: Tensor, layout: Layout) -> dict[str, Tensor]:
    found, begin = dict[str, Tensor](), 0
    for name, (dtype, shape) in layout.items():
        nbytes = dtype.itemsize * prod(shape)
        found[name] = data[begin : begin + nbytes].view(dtype).view(shape)
        begin += _aligned(nbytes)
    return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
