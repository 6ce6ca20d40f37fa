"""Ranks that were called with different things find out before the first byte or token moves.

One exchange of digests over the world; all ranks raise the same error, which names the ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from . import errors
from .comm import Group
from .errors import RequestError, TpxError

T = TypeVar("T")


class Said(NamedTuple):
    """One thing that all ranks must have been given alike. shown: what a message may print."""

    digest: str
    shown: str = ""


def digest(value: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def agree(world: Group, make: Callable[[], tuple[T, Mapping[str, Said]]]) -> T:
    """make() -> the value, and what it was made from, by name ("plan", "checkpoint").

    An error that all ranks raise alike passes through; one that only some raise is raised on all.
    """
    value, error = None, None
    told: dict[str, Any] = {}
    try:
        value, given = make()
        told = {"given": {name: list(said) for name, said in given.items()}}
    except TpxError as caught:
        error = caught
        said = {"hint": caught.hint, "code": caught.code, "exit_code": caught.exit_code}
        told = {"error": [type(caught).__name__, caught.message, said]}
    answers = world.gather_bytes(json.dumps(told).encode(), "check.digest")
    if any(answer != answers[0] for answer in answers):
        raise difference([json.loads(answer) for answer in answers])
    if error is not None:
        raise error
    assert value is not None
    return value


def difference(told: list[dict[str, Any]]) -> TpxError:
    """The error that says what differs; the same on every rank."""
    for rank, one in enumerate(told):
        if "error" in one:
            name, message, said = one["error"]
            kind: type[TpxError] = getattr(errors, name)
            return kind(f"rank `{rank}`: {message}", **said)
    for name in told[0]["given"]:
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, one in enumerate(told):
            holders[one["given"][name][0]].append(rank)
        if len(holders) > 1:
            shown = [told[ranks[0]]["given"][name][1] for ranks in holders.values()]
            return RequestError(
                f"ranks were given different {name}: {parties(list(holders.values()), shown)}",
                "start all ranks with the same command, and call tpx alike on each of them",
            )
    raise AssertionError(f"{told=} do not differ")


def parties(ranks: list[list[int]], shown: list[str]) -> str:
    """ranks `0`, `1` have `a`, rank `2` has `b`."""
    said = []
    for some, value in zip(ranks, shown, strict=True):
        who = f"rank{'s' * (len(some) > 1)} {', '.join(f'`{rank}`' for rank in some)}"
        has = "have" if len(some) > 1 else "has"
        said.append(f"{who} {has} `{value}`" if value and len(set(shown)) > 1 else who)
    joiner = ", " if len(set(shown)) > 1 else " against "
    return joiner.join(said)
