"""Engine: a loop around step(), which computes the next tokens of every request of this dp group.

With dp > 1 the ranks step together, also those that have nothing left. Owns no clock, file or
socket, and knows token ids only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..comm import Groups
from ..ops.sample import sample
from .batch import make_batch, make_draws
from .blocks import Blocks
from .request import Request
from .runner import Runner
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


class Launched(NamedTuple):
    """A step that was begun. tokens: of the chunks that draw, in order; waits for them."""

    drawing: list[Chunk]
    tokens: Callable[[], list[int]]
    logits: list[tuple[Request, torch.Tensor]]
    static: bool  # the runner drew, so its next step can go on from there


class Engine:
    """A runner's model and cache, and the requests that run on them."""

    def __init__(self, runner: Runner, blocks: Blocks, groups: Groups):
        self.runner = runner
        self.blocks = blocks
        self.scheduler = Scheduler(blocks)
        self.groups = groups
        self.ahead: Launched | None = None  # the step after the one whose tokens came last
        runner.forget()

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    @torch.inference_mode()
    def step(self) -> Step | None:
        """The tokens of one forward pass, or None, on all ranks alike, when no rank has a request
        left. Where it can, it begins the next pass before it waits for this one's tokens."""
        launched = self.ahead or self.launch()
        if launched is None:
            return None
        self.ahead = self.launch_ahead() if launched.static else None
        return self.collect(launched)

    def launch(self) -> Launched | None:
        chunks = self.scheduler.schedule()
        agreed = self.agree(chunks)
        if agreed.unfinished == 0:
            return None
        if self.runner.takes(chunks):
            return self.launch_static(chunks)
        batch = make_batch(chunks, agreed.longest, agreed.decode, self.runner.device)
        drawing, logits_BV, asked = select(chunks, self.runner.forward(batch))
        tokens = self.draw(drawing, logits_BV)
        self.scheduler.advance(chunks)
        return Launched(drawing, lambda: tokens, asked, False)

    def launch_ahead(self) -> Launched | None:
        """The next step, if it needs nothing but tokens that are on the device. A request that
        turns out to have ended is computed once too often."""
        if self.scheduler.admits:
            return None
        chunks = self.scheduler.schedule()
        return self.launch_static(chunks) if self.runner.takes(chunks) else None

    def launch_static(self, chunks: list[Chunk]) -> Launched:
        flight = self.runner.launch(chunks)
        self.scheduler.advance(chunks)
        return Launched(chunks, flight.tokens, [], True)

    def collect(self, launched: Launched) -> Step:
        drawn = []
        for chunk, token in zip(launched.drawing, launched.tokens(), strict=True):
            if chunk.request.finish_reason is None:
                chunk.request.append(token)
                drawn.append(Drawn(chunk.request, token))
        self.scheduler.drop()
        return Step(drawn, launched.logits)

    def agree(self, chunks: list[Chunk]) -> Agreed:
        """Tells the other dp groups what this one has; says what all have together."""
        counts = [chunk.size for chunk in chunks]
        mine = [sum(counts), max(counts, default=0), self.scheduler.unfinished]
        told = torch.tensor([mine], dtype=torch.int64, device=self.runner.device)
        tokens, most, unfinished = self.groups["dp"].all_gather(told, "engine.step").T.tolist()
        return Agreed(max(tokens), max(most) <= 1, sum(unfinished))

    def draw(self, drawing: list[Chunk], logits_BV: torch.Tensor) -> list[int]:
        """The next token of each chunk. One rank of a tp group draws, the others are told."""
        if not drawing:
            return []
        tp = self.groups["tp"]
        ids_B = torch.zeros(len(drawing), dtype=torch.int64, device=self.runner.device)
        if tp.rank == 0:
            ids_B = sample(
                logits_BV, *make_draws(drawing, self.runner.device), kernel=self.runner.kernel
            )
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
