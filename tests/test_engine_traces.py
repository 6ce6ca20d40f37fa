"""engine/scheduler.py over random traces: what must hold at every step, whoever comes and goes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from scheduling import request, run, scheduler

from tpx.engine.blocks import GONE, Blocks, pages_for, window_pages
from tpx.engine.request import Request


class Trace:
    """Requests that come, are given up and draw at random, and what must hold at each step."""

    def __init__(self, seed: int, steps: int):
        self.random = random.Random(seed)
        self.steps = steps
        window, tokens = self.random.randint(1, 60), self.random.randint(1, 48)
        most = self.random.randint(1, 90)
        sliding = window_pages(window) + self.random.randint(1, 12)
        full = pages_for(most) + self.random.randint(0, 12)
        requests = self.random.randint(1, min(tokens, 9))
        self.most = most
        self.sched = scheduler(full, sliding, window, tokens, requests, self.random.random() < 0.7)
        self.all: list[Request] = []

    def come(self) -> None:
        length = self.random.randint(2, self.most)
        prompt = self.random.randint(1, length - 1)
        family = self.random.randint(0, 2)  # requests of one begin alike
        tokens = tuple(family * 1000 + place for place in range(prompt))
        ends = frozenset({7} if self.random.random() < 0.3 else ())
        one = Request(tokens, length, stop_ids=ends, id=len(self.all))
        if self.sched.blocks.can_hold(one):
            self.all.append(one)
            self.sched.add(one)

    def run(self) -> Iterator[int]:
        for number in range(self.steps):
            while self.random.random() < 0.3 and len(self.sched.waiting) < 6:
                self.come()
            if self.all and self.random.random() < 0.02:
                given_up = self.random.choice(self.all)
                if given_up.finish_reason is None:
                    self.sched.end(given_up, "cancelled")
            self.step()
            yield number
        while self.sched.unfinished:
            self.step()
        assert all(one.finish_reason for one in self.all)
        assert self.sched.ended == len(self.all)
        assert self.sched.blocks.full.used == self.sched.blocks.sliding.used == 0

    def step(self) -> None:
        sched = self.sched
        oldest = sched.running[:1] or list(sched.waiting)[:1]
        before = [(one.cached, one.known) for one in oldest]
        chunks = sched.schedule()
        assert sum(chunk.size for chunk in chunks) <= sched.limits.tokens
        assert len(sched.running) <= sched.limits.requests
        ids = [one.id for one in [*sched.running, *sched.waiting]]
        assert ids == sorted(ids)
        for chunk in chunks:
            assert chunk.request in sched.running
            assert len(chunk.request.full) >= pages_for(chunk.stop)
            seen = range(sched.blocks.first_seen(chunk.start), pages_for(chunk.stop))
            assert GONE not in [chunk.request.sliding[page] for page in seen]
        run(sched, chunks, token=self.random.randint(0, 9))
        sched.blocks.check(sched.running)
        for one, (cached, known) in zip(oldest, before, strict=True):  # it always comes forward
            assert one.cached > cached or one.known > known or one.finish_reason is not None


@pytest.mark.parametrize("seed", range(12))
def test_no_page_is_lost_no_budget_exceeded_and_the_oldest_always_comes_forward(seed):
    assert sum(1 for _ in Trace(seed, 150).run()) == 150


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 120))
def test_ten_thousand_steps(seed):
    assert sum(1 for _ in Trace(seed, 10_000).run()) == 10_000


def test_a_lost_page_is_found_out(monkeypatch):
    monkeypatch.setattr(Blocks, "release", lambda self, request: setattr(request, "cached", 0))
    with pytest.raises(AssertionError):
        [list(Trace(seed, 150).run()) for seed in range(12)]


def test_a_step_of_many_requests_is_planned_in_little_time():
    sched = scheduler(full=40_000, sliding=6_000, window=128, tokens=8192, requests=256)
    for number in range(256):
        sched.add(request(number, 512, 256))
    while not all(one.decodes for one in sched.running) or len(sched.running) < 256:
        run(sched, sched.schedule())
    begin = time.process_time()
    for _ in range(20):
        run(sched, sched.schedule())
    assert (time.process_time() - begin) / 20 < 0.006
