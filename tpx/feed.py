"""What the first rank hears between two steps, and tells the others: requests, and what was given
up.

All else the ranks work out alike for themselves, so a message is empty in most steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from . import errors
from .comm import Group
from .errors import TpxError
from .params import SamplingParams


class Asked(NamedTuple):
    """A request, checked. seed: of its first continuation."""

    id: str | int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int


class Told(NamedTuple):
    """asked: what came. given_up: numbers of requests, counted as they came. closed: nothing more
    comes."""

    asked: list[Asked]
    given_up: list[int]
    closed: bool = False


def tell(world: Group, hear: Callable[[], Told]) -> Told:
    """What `hear` gives on the first rank, on all; a TpxError that it raises there is raised on
    all."""
    data = b""
    if world.rank == 0:
        try:
            data = to_bytes(hear())
        except TpxError as error:
            data = json.dumps({"error": [type(error).__name__, *said(error)]}).encode()
    return from_bytes(world.broadcast_bytes(data, 0, "engine.requests"))


def said(error: TpxError) -> tuple[str, dict[str, object]]:
    return error.message, {"hint": error.hint, "code": error.code, "exit_code": error.exit_code}


def to_bytes(told: Told) -> bytes:
    if told == Told([], []):
        return b""
    asked = [[one.id, one.prompt, asdict(one.params), one.seed] for one in told.asked]
    return json.dumps([asked, told.given_up, told.closed]).encode()


def from_bytes(data: bytes) -> Told:
    if not data:
        return Told([], [])
    message = json.loads(data)
    if isinstance(message, dict):
        name, text, rest = message["error"]
        raise getattr(errors, name)(text, **rest)
    asked, given_up, closed = message
    known = [
        Asked(name, tuple(prompt), SamplingParams(**params), seed)
        for name, prompt, params, seed in asked
    ]
    return Told(known, given_up, closed)
