"""Session: the answers that are under way on one engine, whoever asked for them.

Every rank steps it alike. With dp > 1 each dp group computes its own requests, and tells the others
what they have said and how they ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from .answer import Answer, Said, from_json
from .comm import Groups
from .engine.engine import Engine, Step
from .launch.beat import STEP, tick
from .results import Completion


class News(NamedTuple):
    """What a step has brought: texts and token ids of streamed answers, and ends, each with the
    answer's number."""

    said: list[tuple[int, str, list[int]]]
    ended: list[tuple[int, Completion]]


class Session:
    """engine: of this rank. The answer with number i belongs to dp group i % dp."""

    def __init__(self, engine: Engine, groups: Groups):
        self.engine = engine
        self.dp = groups.host("dp")
        self.next_number = 0
        self.open = dict[int, Answer]()  # of all dp groups, as all ranks know them
        self._streamed = set[int]()
        self._ended = list[Answer]()  # of this one, not yet told
        self._told = 0  # ends that all have been told of

    def is_mine(self, answer: Answer) -> bool:
        return answer.request.id % self.dp.size == self.dp.rank

    def put(self, answers: Iterable[Answer], streamed: bool = False) -> None:
        """Takes answers, and numbers them. streamed: what each step adds is kept in `said`."""
        for answer in answers:
            number = answer.request.id = self.next_number
            self.next_number += 1
            self.open[number] = answer
            if streamed:
                self._streamed.add(number)
            if self.is_mine(answer):
                self.engine.add(answer.request)
                self._note(answer)

    def cancel(self, answers: Iterable[Answer]) -> None:
        """Ends what is left of the answers, at once."""
        for answer in answers:
            number = answer.request.id
            left = self.open.pop(number, None) is not None
            self._streamed.discard(number)
            if left and self.is_mine(answer) and answer.request.finish_reason is None:
                self.engine.end(answer.request, "cancelled")
                self._note(answer)

    def step(self) -> list[Answer]:
        """One forward pass of all ranks that have something to compute. -> the answers that are
        done, in the order of their ends, the same on every rank."""
        tick(STEP)
        step = self.engine.step()
        tick()
        news = News([], []) if step is None else self._hear(step)
        news.ended.extend((answer.request.id, answer.completion()) for answer in self._ended)
        if self.dp.size > 1:
            if not self._streamed and self.engine.ended <= self._told:
                return []
            news = self._exchange(news)
        self._ended.clear()
        self._told += len(news.ended)
        for number, text, ids in news.said:
            if number in self._streamed:
                self.open[number].said.append(Said(text, ids))
        return self._close(news.ended)

    def _hear(self, step: Step) -> News:
        """Turns a step's tokens into text, and ends what a stop string ends."""
        news = News([], [])
        for drawn in step.drawn:
            number, answer = drawn.request.id, self.open[drawn.request.id]
            text, stopped = answer.hear(drawn)
            if stopped:
                self.engine.end(drawn.request)
            if number in self._streamed:
                news.said.append((number, text, [drawn.token]))
            self._note(answer)
        for request, start, logits in step.logits:
            self.open[request.id].keep(start, logits)
            if start + len(logits) == len(request.prompt):
                self._note(self.open[request.id])
        return news

    def _note(self, answer: Answer) -> None:
        if answer.request.finish_reason is not None:
            self._ended.append(answer)

    def _close(self, ended: list[tuple[int, Completion]]) -> list[Answer]:
        """Those that were not cancelled."""
        closed = []
        for number, completion in ended:
            answer = self.open.pop(number, None)
            self._streamed.discard(number)
            if answer is not None:
                answer.done = completion
                closed.append(answer)
        return closed

    def _exchange(self, mine: News) -> News:
        told = self.dp.gather_bytes(json.dumps(mine).encode(), "engine.results")
        news = News([], [])
        for said, ended in map(json.loads, told):
            news.said.extend(said)
            news.ended.extend((number, from_json(end)) for number, end in ended)
        return news
