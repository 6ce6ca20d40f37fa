"""Requests out of an iterable, continued as they come, given back as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from .answer import Answer
from .comm import Group
from .feed import Asked, Told, tell
from .results import Result
from .session import Session

AHEAD = 2  # requests that are under way or wait, as a multiple of those that run at once


def run_batch(
    session: Session, world: Group, asked: Iterator[Asked], make: Callable[[Asked], list[Answer]]
) -> Iterator[Result]:
    """asked: on the first rank. make: a request's answers. Takes more requests as room comes, so
    that an iterable of any length needs little memory."""
    most = AHEAD * session.engine.scheduler.limits.requests * session.dp.size
    under_way = dict[int, tuple[str | int, list[Answer]]]()  # by the number of each answer
    more = True
    try:
        while more or under_way:
            if more and len(session.open) <= most // 2:
                told = tell(world, lambda: pull(asked, most - len(session.open)))
                more = not told.closed
                for one in told.asked:
                    answers = make(one)
                    session.put(answers)
                    under_way.update((a.request.id, (one.id, answers)) for a in answers)
            for answer in session.step():
                name, answers = under_way.get(answer.request.id, ("", []))
                done = [a.done for a in answers if a.done is not None]
                if answers and len(done) == len(answers):
                    for each in answers:  # several may have ended in this step
                        del under_way[each.request.id]
                    yield Result(name, done)
    finally:
        session.cancel(answer for _, answers in list(under_way.values()) for answer in answers)


def pull(asked: Iterator[Asked], count: int) -> Told:
    found = list(islice(asked, count))
    return Told(found, [], closed=len(found) < count)
