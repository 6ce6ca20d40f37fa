"""A scheduler and requests for tests, and what the engine does between two steps."""

from __future__ import annotations

from tpx.engine.blocks import Blocks
from tpx.engine.request import Request
from tpx.engine.scheduler import Chunk, Limits, Scheduler

WINDOW = 20


def request(number: int, prompt: int, new: int = 1, **changes) -> Request:
    tokens = tuple(range(1000 * number, 1000 * number + prompt))
    return Request(tokens, prompt + new, id=number, **changes)


def scheduler(full: int = 50, sliding: int = 50, window: int = WINDOW, tokens: int = 64,
              requests: int = 64, shares: bool = True) -> Scheduler:  # fmt: skip
    return Scheduler(Blocks(full, sliding, window, shares), Limits(tokens, requests))


def run(one: Scheduler, chunks: list[Chunk], token: int = 7) -> None:
    """What the engine does after a forward pass."""
    drawing = [chunk for chunk in chunks if chunk.draws]
    one.advance(chunks)
    for chunk in drawing:
        chunk.request.append(token)
    one.drop()


def shown(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.request.id, chunk.start, chunk.size) for chunk in chunks]
