"""Which tokens the next step computes: first come, first served, within a budget of tokens.

Every request that decodes gets its token in every step; prompts fill what is left of the budget,
cut into chunks. A request waits until the cache has room for its whole life, so none is ever pushed
out. Knows no tensor.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from .blocks import Blocks
from .request import Request


class Chunk(NamedTuple):
    """Tokens [start, start + size) of a request, computed in one step."""

    request: Request
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def draws(self) -> bool:
        """Whether the next token follows from it."""
        return self.stop == self.request.length and not self.request.all_logits


class Scheduler:
    """Requests that wait and that run. `running` is in order of arrival."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Takes a request; one that may have no further token ends at once."""
        if request.limit <= len(request.prompt) and not request.all_logits:
            request.finish_reason = "length"
        else:
            self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """Admits what fits, and reserves the pages of the chunks that it returns."""
        budget = self.blocks.step_tokens
        while self.admits and len(self.running) < budget:
            self.blocks.admit(self.waiting[0])
            self.running.append(self.waiting.popleft())
        assert self.running or not self.waiting, "a request is larger than the whole cache"
        running = [r for r in self.running if not r.pending or r.length < r.limit]
        counts = {r.id: 1 for r in running if r.length - r.cached == 1}
        budget -= len(counts)
        for request in running:
            if request.id not in counts:
                counts[request.id] = min(budget, request.length - request.cached)
                budget -= counts[request.id]
        chunks = [Chunk(r, r.cached, counts[r.id]) for r in running if counts[r.id]]
        for chunk in chunks:
            self.blocks.grow(chunk.request, chunk.stop)
        return chunks

    @property
    def admits(self) -> bool:
        """Whether the next `schedule` lets a request in."""
        return bool(self.waiting) and self.blocks.fits(self.waiting[0])

    def advance(self, chunks: list[Chunk]) -> None:
        """The chunks will be in the cache before whatever is launched next: gives back what left
        the windows."""
        for chunk in chunks:
            chunk.request.pending += chunk.draws
            chunk.request.cached = chunk.stop
            self.blocks.trim(chunk.request)
            if chunk.request.all_logits and chunk.stop == chunk.request.length:
                chunk.request.finish_reason = "length"

    def drop(self) -> list[Request]:
        """Removes the requests that have ended, and frees their pages."""
        ended = [request for request in self.running if request.finish_reason is not None]
        for request in ended:
            self.blocks.release(request)
            self.running.remove(request)
        return ended
