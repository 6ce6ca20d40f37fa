"""Tokens a second of many requests of mixed lengths, all at once or at a rate, beside the floor.

All at once they go through `generate`, and once more through an AsyncEngine for the times of each;
at a rate through an AsyncEngine alone. A peer takes them in padded batches, in their order.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

from .asked import Asked, Question
from .contest import Answers, Contest, Ours, Timed, agreement
from .peer import Peer
from .served import Served, serve

PERCENTS = (50, 90, 99)


class Round(NamedTuple):
    """served: what each request saw, where that was measured."""

    questions: list[Question]
    seconds: float
    served: list[Served]

    @property
    def written(self) -> int:
        return sum(question.tokens for question in self.questions)

    @property
    def tokens(self) -> int:
        return self.written + sum(len(question.prompt) for question in self.questions)


def main(argument: str) -> None:
    asked = Asked.from_json(argument)
    contest = Contest(asked)
    found, answers = race(contest)
    if asked.rate is None:
        for way in contest.ours:
            found[way.name].append(streamed(way, contest, asked.rounds))
    if not contest.leads:
        return
    agreements = []
    if contest.peer:
        told = agreement(answers[contest.ours[0].name], answers[contest.peer.name])
        agreements.append({"batch": asked.batches[0], **told})
    contest.write([row(contest, name, rounds) for name, rounds in found.items()], agreements)


def race(contest: Contest) -> tuple[dict[str, list[Round]], dict[str, Answers]]:
    """By name: all rounds, and the answers of the last."""
    asked, peer = contest.asked, contest.peer
    found, answers = defaultdict(list), dict[str, Answers]()
    for way in contest.ours:
        way(contest.questions(asked.requests, -1))
    if peer:
        peer.choose(contest.questions(min(asked.batches[0], asked.requests), -1))
    for number in range(asked.rounds):
        questions = contest.questions(asked.requests, number)
        for way in contest.ours:
            if asked.rate is not None:
                found[way.name].append(streamed(way, contest, number))
                continue
            answers[way.name], seconds = way(questions)
            found[way.name].append(Round(questions, seconds, []))
        if peer:
            answers[peer.name], seconds = in_batches(peer, questions, asked.batches[0])
            found[peer.name].append(Round(questions, seconds, []))
    return found, answers


def streamed(way: Ours, contest: Contest, number: int) -> Round:
    questions = contest.questions(contest.asked.requests, number)
    served, seconds = serve(way, questions, contest.asked.arrivals())
    return Round(questions, seconds, served)


def in_batches(peer: Peer, questions: Sequence[Question], most: int) -> Timed:
    answers, total = Answers(), 0.0
    for first in range(0, len(questions), most):
        found, seconds = peer(questions[first : first + most])
        answers, total = answers + found, total + seconds
    return Timed(answers, total)


def row(contest: Contest, name: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """Speeds: of the rounds without an AsyncEngine, where there are any."""
    whole = [r for r in rounds if not r.served] or rounds
    served = [one for r in rounds for one in r.served]
    floors = [floor_seconds(contest, r.questions) for r in whole]
    return {
        "way": name,
        "seconds": median(r.seconds for r in whole),
        "output_per_second": median(r.written / r.seconds for r in whole),
        "total_per_second": median(r.tokens / r.seconds for r in whole),
        "first_token": percentiles([one.first_token for one in served]),
        "token": percentiles([one.token for one in served if one.token is not None]),
        "floor": median(floors),
        "share": median(floor / r.seconds for floor, r in zip(floors, whole, strict=True)),
        "rounds": [r.seconds for r in whole],
    }


def floor_seconds(contest: Contest, questions: Sequence[Question]) -> float:
    """Of the decode steps alone, all of them full; at a rate not before the last has come."""
    asked, count = contest.asked, len(questions)
    at_once = min(asked.batches[0], count)
    written = sum(question.tokens for question in questions)
    read = sum(len(question.prompt) + question.tokens // 2 for question in questions)
    step = contest.floor.step_seconds(at_once, read // count)
    return max(written / at_once * step, max(asked.arrivals()))


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """By `p50` and so on, between the nearest values; None where there are none."""
    if not values:
        return None
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return {f"p{percent}": cuts[percent - 1] for percent in PERCENTS}


if __name__ == "__main__":
    main(sys.argv[1])
