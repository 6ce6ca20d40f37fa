"""Time to the first token and time a token, of some sequences at once, beside the floor.

Each round asks twice, with new prompts: for one token, and for all of them. What the second takes
longer is the time of the other tokens.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from .asked import Asked, Question
from .contest import Contest, Ours, Timed, agreement

Runner = Callable[[Sequence[Question]], Timed]


class Round(NamedTuple):
    """Seconds to the first token, and of the whole."""

    first: float
    whole: float


def main(argument: str) -> None:
    asked = Asked.from_json(argument)
    contest = Contest(asked)
    rows, agreements = [], []
    for batch in asked.batches:
        found, answers = race(contest, batch)
        rows += [row(contest, name, batch, rounds) for name, rounds in found.items()]
        if contest.peer:
            told = agreement(answers[contest.ours[0].name], answers[contest.peer.name])
            agreements.append({"batch": batch, **told})
    if contest.leads:
        contest.write(rows, agreements)


def race(contest: Contest, batch: int) -> tuple[dict[str, list[Round]], dict[str, list[list[int]]]]:
    """By name: all rounds, and the answers of the last."""
    warm = contest.questions(batch, -1)
    ways: list[Ours | Any] = list(contest.ours)
    if contest.peer:
        contest.peer.choose(warm)
        ways.append(contest.peer)
    for way in ways:
        way(warm)
    found, answers = defaultdict(list), {}
    for number in range(contest.asked.rounds):
        first = [q._replace(tokens=1) for q in contest.questions(batch, 2 * number)]
        whole = contest.questions(batch, 2 * number + 1)
        for way in ways:
            _, to_first = way(first)
            answers[way.name], seconds = way(whole)
            found[way.name].append(Round(to_first, seconds))
    return dict(found), answers


def row(contest: Contest, name: str, batch: int, rounds: Sequence[Round]) -> dict[str, Any]:
    tokens = contest.asked.output.most
    token = median((r.whole - r.first) / (tokens - 1) for r in rounds)
    context = contest.asked.input.most + tokens // 2
    floor = contest.floor.step_seconds(batch, context)
    return {
        "way": name,
        "batch": batch,
        "first_token": median(r.first for r in rounds),
        "token": token,
        "seconds": median(r.whole for r in rounds),
        "tokens_per_second": median(batch * tokens / r.whole for r in rounds),
        "floor": floor,
        "share": floor / token,
        "rounds": [r.whole for r in rounds],
    }


if __name__ == "__main__":
    main(sys.argv[1])
