"""engine/request.py and scheduler.py: budgets and order, without a tensor."""

from __future__ import annotations

import pytest
from scheduling import request, run, scheduler, shown

from tpx.engine.request import Request


def test_a_request_gives_prompt_and_output_as_one_sequence():
    one = Request((5, 6, 7), limit=6, output=[8, 9])
    assert one.tokens(0, 5) == [5, 6, 7, 8, 9]
    assert one.tokens(2, 4) == [7, 8]
    assert one.tokens(3, 5) == [8, 9]
    assert one.tokens(1, 2) == [6]


@pytest.mark.parametrize(
    ("tokens", "reason"), [([4, 4], None), ([4, 4, 4], "length"), ([4, 2], "stop"), ([2], "stop")]
)
def test_a_request_ends_at_a_stop_token_or_at_its_limit(tokens, reason):
    one = Request((1, 1), limit=5, stop_ids=frozenset({2}))
    for token in tokens:
        one.pending += 1
        one.append(token)
    assert one.finish_reason == reason


def test_a_stop_token_that_is_the_last_one_allowed_is_a_stop():
    one = Request((1,), limit=2, stop_ids=frozenset({2}), cached=1, pending=1)
    one.append(2)
    assert one.finish_reason == "stop"


def test_one_token_of_each_that_decodes_then_prompts_in_order():
    sched = scheduler(tokens=10)
    old, first, second = request(0, 4, 5), request(1, 12, 5), request(2, 9, 5)
    sched.add(old)
    run(sched, sched.schedule())
    sched.add(first)
    sched.add(second)
    seen = []
    for _ in range(3):
        chunks = sched.schedule()
        seen.append(shown(chunks))
        run(sched, chunks)
    assert seen == [
        [(0, 4, 1), (1, 0, 9)],
        [(0, 5, 1), (1, 9, 3), (2, 0, 6)],
        [(0, 6, 1), (1, 12, 1), (2, 6, 3)],
    ]


def test_a_long_prompt_takes_no_more_than_the_budget_from_those_that_decode():
    sched = scheduler(full=100, sliding=100, tokens=16)
    short = [request(number, 2, 100) for number in range(3)]
    for one in short:
        sched.add(one)
    run(sched, sched.schedule())
    sched.add(request(3, 400, 1))
    for _ in range(20):
        chunks = sched.schedule()
        assert [chunk.size for chunk in chunks] == [1, 1, 1, 13]
        run(sched, chunks)
    assert [len(one.output) for one in short] == [21] * 3


def test_a_request_waits_until_there_are_pages_for_the_tokens_that_it_has():
    sched = scheduler(full=6)
    for number in range(3):
        sched.add(request(number, prompt=20, new=13))
    # Two pages each, one more for each that runs and for the one that comes: 2 + 1, then 2 + 1.
    assert [chunk.request.id for chunk in sched.schedule()] == [0, 1]
    assert [waiting.id for waiting in sched.waiting] == [2]


def test_no_more_requests_run_than_are_allowed():
    sched = scheduler(requests=2)
    for number in range(3):
        sched.add(request(number, 3, 3))
    assert [chunk.request.id for chunk in sched.schedule()] == [0, 1]


def test_the_last_that_came_gives_its_pages_to_those_before_it_and_comes_back():
    sched = scheduler(full=5, shares=False)
    old, late = request(0, 16, 40), request(1, 14, 30)
    sched.add(old)
    run(sched, sched.schedule())
    sched.add(late)
    ran = []
    while sched.unfinished:
        run(sched, sched.schedule())
        ran.append(late in sched.running)
        sched.blocks.check(sched.running)
    assert sched.preempted == 1
    # It runs, waits, and runs again once the first has ended.
    assert [here for here, before in zip(ran, [None, *ran], strict=False) if here != before] == [
        True,
        False,
        True,
        False,
    ]
    assert (old.finish_reason, len(old.output)) == ("length", 40)
    assert (late.finish_reason, len(late.output)) == ("length", 30)


def test_a_preempted_request_computes_prompt_and_output_anew():
    sched = scheduler(shares=False)
    one = request(0, 10, 30)
    sched.add(one)
    for _ in range(5):
        run(sched, sched.schedule())
    sched.preempt(one)
    sched.blocks.check([])
    [chunk] = sched.schedule()
    assert (chunk.start, chunk.size, chunk.draws) == (0, 15, True)


def test_a_request_with_no_room_for_a_token_ends_at_once_and_computes_nothing():
    sched = scheduler(4, 4, tokens=8)
    one = Request((1, 2, 3), limit=3)
    sched.add(one)
    assert (one.finish_reason, one.output, sched.unfinished, sched.ended) == ("length", [], 0, 1)


def test_a_request_for_logits_draws_nothing_and_ends_with_its_prompt():
    sched = scheduler(4, 4, tokens=8)
    one = Request(tuple(range(12)), limit=12, all_logits=True)
    sched.add(one)
    sizes = []
    while sched.unfinished:
        chunks = sched.schedule()
        assert not any(chunk.draws for chunk in chunks)
        sizes += [chunk.size for chunk in chunks]
        run(sched, chunks)
    assert (sizes, one.output, one.finish_reason) == ([8, 4], [], "length")


def test_a_request_that_is_ended_frees_its_pages_at_once_wherever_it_is():
    sched = scheduler(8, 8, tokens=8)
    one, other, waiting = request(0, 5, 20), request(1, 3, 20), request(2, 60, 20)
    for added in (one, other, waiting):
        sched.add(added)
    run(sched, sched.schedule())
    sched.end(one, "cancelled")
    sched.end(waiting, "stop")
    assert (one.finish_reason, waiting.finish_reason, sched.ended) == ("cancelled", "stop", 2)
    assert (sched.running, list(sched.waiting)) == ([other], [])
    sched.blocks.check(sched.running)
    assert sched.blocks.full.used == 1


def test_the_next_step_is_known_ahead_where_it_is_one_token_each():
    sched = scheduler(full=6)
    one, other = request(0, 15, 20), request(1, 4, 2)
    sched.add(one)
    sched.add(other)
    first = sched.schedule()
    sched.advance(first)
    assert shown(sched.ahead()) == [(0, 15, 1), (1, 4, 1)]
    sched.advance(sched.ahead())
    # The second has as many tokens on the way as it may have.
    assert shown(sched.ahead()) == [(0, 16, 1)]


def test_nothing_is_known_ahead_where_one_may_come_in_or_must_give_way():
    sched = scheduler(full=6)
    sched.add(request(0, 15, 20))
    sched.advance(sched.schedule())
    sched.add(request(1, 4, 2))
    assert sched.ahead() == []
    short = scheduler(full=2, sliding=8, shares=False)
    short.add(request(0, 16, 10))
    short.add(request(1, 16, 1))
    short.blocks.full.take()
    short.advance(short.schedule())
    assert short.ahead() == []
