"""Requests that come one by one to an AsyncEngine, and when their tokens came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..async_engine import AsyncEngine
from ..params import Request
from .asked import Question
from .contest import Ours, params_of


class Served(NamedTuple):
    """Of one request: seconds from its arrival to its first token, and a token after that."""

    first_token: float
    token: float | None  # where it has one token only there is none


def serve(
    way: Ours, questions: Sequence[Question], arrivals: Sequence[float]
) -> tuple[list[Served], float]:
    """(each request's times, seconds until all are done), on rank 0; elsewhere ([], 0).
    arrivals: seconds from the start."""
    with way.running():
        return asyncio.run(_serve(way, questions, arrivals))


async def _serve(
    way: Ours, questions: Sequence[Question], arrivals: Sequence[float]
) -> tuple[list[Served], float]:
    async with AsyncEngine(way.llm) as engine:
        if not engine.leads:
            engine.follow()
            return [], 0.0
        begin = time.perf_counter()
        asked = zip(questions, arrivals, strict=True)
        found = await asyncio.gather(*(ask(engine, one, begin + late) for one, late in asked))
        return found, time.perf_counter() - begin


async def ask(engine: Any, question: Question, at: float) -> Served:
    """at: when it comes, by time.perf_counter()."""
    await asyncio.sleep(at - time.perf_counter())
    times: list[float] = []
    async for piece in engine.generate(Request(question.prompt, params_of(question))):
        times += [time.perf_counter()] * len(piece.token_ids)
    assert len(times) == question.tokens, f"{len(times)=} {question.tokens=}"
    token = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    return Served(times[0] - at, token)
