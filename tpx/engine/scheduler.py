"""Which tokens the next step computes: first come, first served, within a budget of tokens.

Every request that decodes gets its token in every step; prompts fill what is left of the budget,
cut into chunks. A request is let in when there are pages for the tokens that it has; where pages
run out, the one that came last gives all of its back, waits, and computes them anew. Knows no
tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from ..results import FinishReason
from .blocks import Blocks, Pages
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


class Limits(NamedTuple):
    """Of one step: tokens, and requests."""

    tokens: int
    requests: int


class Scheduler:
    """Requests that wait and that run, both in order of arrival; none that waits came before one
    that runs. preempted: how often one has given its pages back. ended: requests so far."""

    def __init__(self, blocks: Blocks, limits: Limits):
        self.blocks = blocks
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preempted = 0
        self.ended = 0

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Takes a request; one that may have no further token ends at once."""
        assert self.blocks.can_hold(request), "a request is larger than the whole cache"
        if request.limit <= len(request.prompt) and not request.all_logits:
            request.finish_reason = "length"
            self.ended += 1
        else:
            self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The next step; its pages are taken."""
        left = self.limits.tokens - sum(request.decodes for request in self.running)
        chunks: list[Chunk] = []
        for request in list(self.running):
            most = 1 if request.decodes else min(left, request.length - request.cached)
            size = self.fit(request, most)
            left -= 0 if request.decodes else size
            if size:
                chunks.append(self.chunk(request, size))
        while left and self.admits:
            request = self.admit()
            size = self.blocks.room(request, min(left, request.length - request.cached))
            chunks.append(self.chunk(request, size))
            left -= size
        return chunks

    def ahead(self) -> list[Chunk]:
        """The next step while the last one's tokens are unknown, where all that it does is one
        token each; else []. Requests that have all their tokens take no part."""
        running = [request for request in self.running if request.length < request.limit]
        if self.admits or not all(request.decodes for request in running):
            return []
        needs = [self.blocks.missing(request, request.cached + 1) for request in running]
        if not self.blocks.has(total(needs)):
            return []
        return [self.chunk(request, 1) for request in running]

    def fit(self, request: Request, most: int) -> int:
        """How many of `most` tokens a running request gets. Makes room for one at the cost of those
        that came later, or else gives its own pages back."""
        while most and request in self.running:
            size = self.blocks.room(request, most)
            if size:
                return size
            self.preempt(self.running[-1])
        return 0

    def chunk(self, request: Request, size: int) -> Chunk:
        assert size > 0
        self.blocks.grow(request, request.cached + size)
        return Chunk(request, request.cached, size)

    @property
    def admits(self) -> bool:
        """Whether the next `schedule` may let a request in: there are pages for all its tokens, for
        those that running ones have still to compute, and one more for each."""
        if not self.waiting or len(self.running) >= self.limits.requests:
            return False
        if not self.running:
            return True
        promised = [self.blocks.promised(request) for request in self.running]
        return self.blocks.takes(self.waiting[0], total(promised))

    def admit(self) -> Request:
        request = self.waiting.popleft()
        self.blocks.share(request)
        self.running.append(request)
        return request

    def preempt(self, request: Request) -> None:
        self.blocks.release(request)
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preempted += 1

    def advance(self, chunks: list[Chunk]) -> None:
        """The chunks will be in the cache before whatever is launched next: says what their pages
        hold, and gives back what left the windows."""
        for chunk in chunks:
            chunk.request.pending += chunk.draws
            chunk.request.cached = chunk.stop
            self.blocks.name(chunk.request)
            self.blocks.trim(chunk.request)
            if chunk.request.all_logits and chunk.stop == chunk.request.length:
                chunk.request.finish_reason = "length"

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it is, and frees its pages."""
        request.finish_reason = reason
        if request in self.waiting:
            self.waiting.remove(request)
            self.ended += 1
        self.drop()

    def drop(self) -> None:
        """Removes the requests that have ended, and frees their pages."""
        ended = [request for request in self.running if request.finish_reason is not None]
        for request in ended:
            self.blocks.release(request)
            self.running.remove(request)
        self.ended += len(ended)


def total(needs: Iterable[Pages]) -> Pages:
    full = sliding = 0
    for need in needs:
        full, sliding = full + need.full, sliding + need.sliding
    return Pages(full, sliding)
