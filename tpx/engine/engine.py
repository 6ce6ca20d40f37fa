"""Engine: a loop around step(), which computes the next tokens of every request of this dp group.

With dp > 1 the ranks step together, also those that have nothing left. Owns no clock, file or
socket, and knows token ids only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..batch import KVCache
from ..comm import Groups
from ..ops.kernel import REFERENCE, Kernels
from ..ops.sample import sample
from .batch import make_batch, make_draws
from .blocks import Blocks
from .request import Request
from .scheduler import Chunk, Scheduler


class Drawn(NamedTuple):
    """A request's next token; its finish_reason says whether it was the last."""

    request: Request
    token: int


class Step(NamedTuple):
    """What a step yields. logits: [tokens, vocab] float32, a chunk of a request with all_logits."""

    drawn: list[Drawn]
    logits: list[tuple[Request, torch.Tensor]]


class Agreed(NamedTuple):
    """What the ranks know of each other before a forward pass."""

    longest: int  # tokens of the rank that has most
    decode: bool  # no rank has a chunk of several tokens
    unfinished: int  # requests, over all dp groups


class Engine:
    """A model, its cache and the requests that run on it."""

    def __init__(
        self,
        model: nn.Module,
        caches: list[KVCache],
        blocks: Blocks,
        groups: Groups,
        device: torch.device,
        kernels: Kernels = REFERENCE,
    ):
        self.model = model
        self.caches = caches
        self.blocks = blocks
        self.scheduler = Scheduler(blocks)
        self.groups = groups
        self.device = device
        self.kernel = kernels.get("sample")

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    @torch.inference_mode()
    def step(self) -> Step | None:
        """One forward pass, or None, on all ranks alike, when no rank has a request left."""
        chunks = self.scheduler.schedule()
        agreed = self.agree(chunks)
        if agreed.unfinished == 0:
            return None
        batch = make_batch(chunks, agreed.longest, agreed.decode, self.device)
        drawing, logits_BV, asked = select(chunks, self.model(batch, self.caches))
        tokens = self.draw(drawing, logits_BV)
        self.scheduler.advance(chunks)
        for chunk, token in zip(drawing, tokens, strict=True):
            chunk.request.append(token)
        self.scheduler.drop()
        return Step([Drawn(c.request, t) for c, t in zip(drawing, tokens, strict=True)], asked)

    def agree(self, chunks: list[Chunk]) -> Agreed:
        """Tells the other dp groups what this one has; says what all have together."""
        counts = [chunk.size for chunk in chunks]
        mine = [sum(counts), max(counts, default=0), self.scheduler.unfinished]
        told = torch.tensor([mine], dtype=torch.int64, device=self.device)
        tokens, most, unfinished = self.groups["dp"].all_gather(told, "engine.step").T.tolist()
        return Agreed(max(tokens), max(most) <= 1, sum(unfinished))

    def draw(self, drawing: list[Chunk], logits_BV: torch.Tensor) -> list[int]:
        """The next token of each chunk. One rank of a tp group draws, the others are told."""
        if not drawing:
            return []
        tp = self.groups["tp"]
        ids_B = torch.zeros(len(drawing), dtype=torch.int64, device=self.device)
        if tp.rank == 0:
            ids_B = sample(logits_BV, *make_draws(drawing, self.device), self.kernel)
        ids: list[int] = tp.broadcast(ids_B, 0, "engine.sample").tolist()
        return ids

    def end(self, request: Request) -> None:
        """Ends a request as a stop string does. All ranks of its tp group call it."""
        request.finish_reason = "stop"
        self.scheduler.drop()


def select(
    chunks: list[Chunk], logits_MV: torch.Tensor
) -> tuple[list[Chunk], torch.Tensor, list[tuple[Request, torch.Tensor]]]:
    """The chunks that draw, the rows that they draw from, and the logits that were asked for."""
    rows = [chunk.size if chunk.request.all_logits else int(chunk.draws) for chunk in chunks]
    parts = torch.split(logits_MV, rows) if rows else ()
    drawing, drawn, asked = [], [logits_MV[:0]], []
    for chunk, part in zip(chunks, parts, strict=True):
        if chunk.request.all_logits:
            asked.append((chunk.request, part))
        elif chunk.draws:
            drawing.append(chunk)
            drawn.append(part)
    return drawing, torch.cat(drawn), asked
