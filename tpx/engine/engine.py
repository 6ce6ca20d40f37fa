"""Engine: a loop around step(), which computes the next tokens of every request of this dp group.

With dp > 1 the ranks step together, also those that have nothing left. All ranks of a dp group are
told of the same requests in the same order and decide alike. Owns no clock, file or socket, and
knows token ids only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..comm import Groups
from ..ops.sample import sample
from ..results import FinishReason, Likely
from .batch import Draws, make_batch, make_draws
from .blocks import Blocks
from .likely import likeliest
from .request import Request
from .runner import NO_SHAPE, Runner, Shape
from .scheduler import Chunk, Limits, Scheduler


class Drawn(NamedTuple):
    """A request's next token; its finish_reason says whether it was the last. likely: where the
    request asks for logprobs."""

    request: Request
    token: int
    likely: Likely | None = None


class Asked(NamedTuple):
    """logits [tokens, vocab] float32 of a request with all_logits, from position `start` on."""

    request: Request
    start: int
    logits: torch.Tensor


class Step(NamedTuple):
    drawn: list[Drawn]
    logits: list[Asked]


class Agreed(NamedTuple):
    """What the dp groups know of each other before a forward pass."""

    longest: int  # tokens of the rank that has most
    decode: bool  # no rank has a chunk of several tokens
    shape: Shape | None  # that every rank's step fits, if it is one of a fixed shape
    unfinished: int  # requests, over all dp groups


class Launched(NamedTuple):
    """A step that was begun. tokens: of the chunks that draw, in order; waits for them."""

    drawing: list[Chunk]
    tokens: Callable[[], list[int]]
    likely: list[Likely | None]
    logits: list[Asked]
    static: bool  # the runner drew, so its next step can go on from there


class Engine:
    """A runner's model and cache, and the requests that run on them."""

    def __init__(self, runner: Runner, blocks: Blocks, limits: Limits, groups: Groups):
        self.runner = runner
        self.blocks = blocks
        self.scheduler = Scheduler(blocks, limits)
        self.groups = groups
        self.others = groups.host("dp")
        self.ahead: Launched | None = None  # the step after the one whose tokens came last
        self.ended = 0  # requests of all dp groups, when they last agreed

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
        launched = (
            self.launch_static(chunks, agreed.shape)
            if agreed.shape
            else self.launch_any(chunks, agreed)
        )
        self.scheduler.advance(chunks)
        return launched

    def launch_ahead(self) -> Launched | None:
        """The next step, if on no rank it needs anything but tokens that are on the device. A
        request that turns out to have ended is computed once too often."""
        chunks = self.scheduler.ahead()
        agreed = self.agree(chunks)
        if agreed.shape is None:
            return None
        launched = self.launch_static(chunks, agreed.shape)
        self.scheduler.advance(chunks)
        return launched

    def launch_static(self, chunks: list[Chunk], shape: Shape) -> Launched:
        flight = self.runner.launch(chunks, shape)
        return Launched(chunks, flight.tokens, [None] * len(chunks), [], True)

    def launch_any(self, chunks: list[Chunk], agreed: Agreed) -> Launched:
        batch = make_batch(chunks, agreed.longest, agreed.decode, self.runner.device)
        drawing = [c for c in chunks if c.draws and not c.request.all_logits]
        draws = make_draws(drawing, self.runner.device)  # before what the device is busy with
        logits_BV, asked = select(chunks, self.runner.forward(batch))
        tokens = self.draw(draws, logits_BV)
        likely = likeliest(drawing, logits_BV, tokens)
        return Launched(drawing, lambda: tokens, likely, asked, False)

    def collect(self, launched: Launched) -> Step:
        drawn = []
        found = zip(launched.drawing, launched.tokens(), launched.likely, strict=True)
        for (request, *_), token, likely in found:
            if request.finish_reason is None:
                request.append(token)
                drawn.append(Drawn(request, token, likely))
        self.scheduler.drop()
        return Step(drawn, launched.logits)

    def agree(self, chunks: list[Chunk]) -> Agreed:
        """Tells the other dp groups what this one has; says what all have together."""
        counts = [chunk.size for chunk in chunks]
        shape = self.runner.shape(chunks) or NO_SHAPE
        mine = [
            sum(counts),
            max(counts, default=0),
            self.scheduler.unfinished,
            self.scheduler.ended,
        ]
        told = self.others.all_gather(torch.tensor([[*mine, *shape]]), "engine.step")
        tokens, most, unfinished, ended, *parts = told.T.tolist()
        self.ended = sum(ended)
        fixed = None if 0 in parts[0] else Shape(*map(max, parts))
        return Agreed(max(tokens), max(most) <= 1, fixed, sum(unfinished))

    def draw(self, draws: Draws, logits_BV: torch.Tensor) -> list[int]:
        """The next token of each row. One rank of a tp group draws, the others are told."""
        rows, tp = len(logits_BV), self.groups["tp"]
        if not rows:
            return []
        if tp.rank == 0:
            ids_B = sample(logits_BV, *draws, kernel=self.runner.kernel)
        else:
            ids_B = torch.zeros(rows, dtype=torch.int64, device=self.runner.device)
        ids: list[int] = tp.broadcast(ids_B, 0, "engine.sample").tolist()
        return ids

    def end(self, request: Request, reason: FinishReason = "stop") -> None:
        """Ends a request, at once, as a stop string or its caller does. All ranks of its tp group
        call it."""
        self.scheduler.end(request, reason)


def select(chunks: list[Chunk], logits_MV: torch.Tensor) -> tuple[torch.Tensor, list[Asked]]:
    """The rows that the chunks that draw draw from, and the logits that were asked for."""
    if not any(chunk.request.all_logits for chunk in chunks):
        return logits_MV, []
    rows = [chunk.size if chunk.request.all_logits else int(chunk.draws) for chunk in chunks]
    drawn, asked = [logits_MV[:0]], []
    for chunk, part in zip(chunks, torch.split(logits_MV, rows), strict=True):
        if chunk.request.all_logits:
            asked.append(Asked(chunk.request, chunk.start, part))
        else:
            drawn.append(part)
    return torch.cat(drawn), asked
