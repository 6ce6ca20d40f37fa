"""engine/request.py, blocks.py and scheduler.py: pages, budgets and order, without a tensor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tpx.engine.blocks import GONE, Blocks, Pool, pages_for, resting_pages, window_pages
from tpx.engine.request import Request
from tpx.engine.scheduler import Chunk, Scheduler
from tpx.plan.buffers import PAGE


def request(number: int, prompt: int, new: int = 1, **changes) -> Request:
    return Request(number, tuple(range(prompt)), prompt + new, **changes)


def run(scheduler: Scheduler, chunks: list[Chunk], token: int = 7) -> None:
    """What the engine does after a forward pass."""
    drawing = [chunk for chunk in chunks if chunk.draws]
    scheduler.advance(chunks)
    for chunk in drawing:
        chunk.request.append(token)
    scheduler.drop()


def test_a_request_gives_prompt_and_output_as_one_sequence():
    one = Request(0, (5, 6, 7), limit=6, output=[8, 9])
    assert one.tokens(0, 5) == [5, 6, 7, 8, 9]
    assert one.tokens(2, 4) == [7, 8]
    assert one.tokens(3, 5) == [8, 9]
    assert one.tokens(1, 2) == [6]


@pytest.mark.parametrize(
    ("tokens", "reason"), [([4, 4], None), ([4, 4, 4], "length"), ([4, 2], "stop"), ([2], "stop")]
)
def test_a_request_ends_at_a_stop_token_or_at_its_limit(tokens, reason):
    one = Request(0, (1, 1), limit=5, stop_ids=frozenset({2}))
    for token in tokens:
        one.pending += 1
        one.append(token)
    assert one.finish_reason == reason


def test_a_stop_token_that_is_the_last_one_allowed_is_a_stop():
    one = Request(0, (1,), limit=2, stop_ids=frozenset({2}), cached=1, pending=1)
    one.append(2)
    assert one.finish_reason == "stop"


def test_pages_are_counted_from_tokens():
    assert [pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert [window_pages(tokens) for tokens in (0, 1, 2, 17, 18)] == [0, 1, 2, 2, 3]


def test_a_pool_gives_the_lowest_page_first():
    pool = Pool(3)
    taken = [pool.take(), pool.take()]
    pool.give(taken[0])
    assert (taken, pool.take(), pool.used) == ([0, 1], 0, 2)


@pytest.mark.parametrize("window", [1, 2, 8, 16, 17, 64])
@pytest.mark.parametrize("budget", [1, 7, 16, 40])
def test_between_steps_a_sliding_layer_keeps_the_window_and_no_more(window, budget):
    one = request(0, prompt=90, new=60)
    blocks = Blocks(pages_for(149), resting_pages(one, window) + pages_for(budget), window, budget)
    scheduler = Scheduler(blocks)
    scheduler.add(one)
    while scheduler.unfinished:
        run(scheduler, scheduler.schedule())
        if one.finish_reason is None:
            seen = range(max(0, one.cached - window + 1), one.cached)
            needed = {position // PAGE for position in seen}
            held = {j for j, page in enumerate(one.sliding) if page != GONE}
            touched = {(one.cached - 1) // PAGE} if one.cached % PAGE else set()
            assert needed <= held <= needed | touched
            assert blocks.sliding.used == len(held) <= window_pages(window)
        blocks.check(scheduler.running)
    assert blocks.full.used == blocks.sliding.used == blocks.promised == 0


def test_one_token_of_each_that_decodes_then_prompts_in_order():
    scheduler = Scheduler(Blocks(50, 50, window=16, step_tokens=10))
    old, first, second = request(0, 4, 5), request(1, 12, 5), request(2, 9, 5)
    scheduler.add(old)
    run(scheduler, scheduler.schedule())
    scheduler.add(first)
    scheduler.add(second)
    seen = []
    for _ in range(3):
        chunks = scheduler.schedule()
        seen.append([(chunk.request.id, chunk.start, chunk.size) for chunk in chunks])
        run(scheduler, chunks)
    assert seen == [
        [(0, 4, 1), (1, 0, 9)],
        [(0, 5, 1), (1, 9, 3), (2, 0, 6)],
        [(0, 6, 1), (1, 12, 1), (2, 6, 3)],
    ]


def test_a_request_waits_until_pages_for_its_whole_life_are_free():
    scheduler = Scheduler(Blocks(full=4, sliding=40, window=16, step_tokens=64))
    for number in range(3):
        scheduler.add(request(number, prompt=20, new=13))  # 32 tokens are cached: two pages
    assert [chunk.request.id for chunk in scheduler.schedule()] == [0, 1]
    assert [waiting.id for waiting in scheduler.waiting] == [2]


def test_a_request_with_no_room_for_a_token_ends_at_once_and_computes_nothing():
    scheduler = Scheduler(Blocks(4, 4, window=16, step_tokens=8))
    one = Request(0, (1, 2, 3), limit=3)
    scheduler.add(one)
    assert (one.finish_reason, one.output, scheduler.unfinished) == ("length", [], 0)


def test_a_request_for_logits_draws_nothing_and_ends_with_its_prompt():
    scheduler = Scheduler(Blocks(4, 4, window=16, step_tokens=8))
    one = Request(0, tuple(range(12)), limit=12, all_logits=True)
    scheduler.add(one)
    sizes = []
    while scheduler.unfinished:
        chunks = scheduler.schedule()
        assert not any(chunk.draws for chunk in chunks)
        sizes += [chunk.size for chunk in chunks]
        run(scheduler, chunks)
    assert (sizes, one.output, one.finish_reason) == ([8, 4], [], "length")


def test_a_request_dropped_while_it_runs_frees_its_pages():
    blocks = Blocks(8, 8, window=16, step_tokens=8)
    scheduler = Scheduler(blocks)
    one, other = request(0, 5, 20), request(1, 3, 20)
    scheduler.add(one)
    scheduler.add(other)
    run(scheduler, scheduler.schedule())
    one.finish_reason = "stop"
    assert scheduler.drop() == [one]
    assert scheduler.running == [other]
    blocks.check(scheduler.running)


def test_the_check_of_pages_can_fail():
    blocks = Blocks(4, 4, window=16, step_tokens=8)
    one = request(0, 5, 20)
    blocks.admit(one)
    blocks.check([one])
    one.full[0] = one.full[1]
    with pytest.raises(AssertionError):
        blocks.check([one])


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=8),
    budget=st.integers(1, 40),
    window=st.integers(1, 50),
    spare=st.integers(0, 6),
    together=st.integers(1, 8),
)
def test_every_request_is_served_in_budget_and_every_page_comes_back(
    sizes, budget, window, spare, together
):
    requests = [request(i, prompt, new) for i, (prompt, new) in enumerate(sizes)]
    full = sorted((pages_for(r.most_cached) for r in requests), reverse=True)[:together]
    rest = sorted((resting_pages(r, window) for r in requests), reverse=True)[:together]
    blocks = Blocks(sum(full) + spare, sum(rest) + pages_for(budget), window, budget)
    scheduler = Scheduler(blocks)
    for one in requests:
        scheduler.add(one)
    admitted: list[int] = []
    while scheduler.unfinished:
        chunks = scheduler.schedule()
        assert 0 < sum(chunk.size for chunk in chunks) <= budget
        decoding = [r for r in scheduler.running if r.output]
        assert {r.id for r in decoding} <= {chunk.request.id for chunk in chunks}
        admitted += [r.id for r in scheduler.running if r.id not in admitted]
        run(scheduler, chunks)
        blocks.check(scheduler.running)
    assert admitted == sorted(admitted)
    assert [len(r.output) for r in requests] == [new for _, new in sizes]
    assert blocks.full.used == blocks.sliding.used == 0
