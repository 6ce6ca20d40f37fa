"""engine/pool.py and blocks.py: who holds which page, and what is shared, without a tensor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from scheduling import WINDOW, request, run, scheduler, shown

from tpx.engine.blocks import GONE, Blocks, page_keys, pages_for, window_pages
from tpx.engine.pool import Pool
from tpx.engine.request import Request
from tpx.plan.buffers import PAGE


def test_pages_are_counted_from_tokens():
    assert [pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert [window_pages(tokens) for tokens in (0, 1, 2, 17, 18)] == [0, 1, 2, 2, 3]


def test_a_pool_gives_pages_that_say_nothing_first_then_those_given_back_first():
    pool = Pool(4)
    taken = [pool.take() for _ in range(3)]
    assert taken == [0, 1, 2]
    pool.name(1, b"one")
    pool.name(2, b"two")
    for page in (2, 0, 1):
        pool.give(page)
    assert (pool.free, pool.used) == (4, 0)
    assert [pool.find(key) for key in (b"one", b"two", b"no")] == [1, 2, None]
    assert [pool.take(), pool.take(), pool.take()] == [0, 3, 2]
    assert [pool.find(key) for key in (b"one", b"two")] == [1, None]
    pool.check([0, 3, 2])


def test_a_page_has_as_many_holders_as_found_it():
    pool = Pool(2)
    page = pool.take()
    pool.name(page, b"x")
    pool.hold(page)
    pool.give(page)
    assert pool.is_held(b"x")
    pool.check([page])
    pool.give(page)
    assert not pool.is_held(b"x")
    pool.hold(page)
    pool.check([page])
    with pytest.raises(AssertionError):
        pool.check([page, page])


def test_a_key_says_all_tokens_up_to_the_end_of_its_page():
    one, other = request(0, 40), request(0, 40)
    other.prompt = (*one.prompt[:20], 5, *one.prompt[21:])
    mine, theirs = page_keys(one, 2), page_keys(other, 2)
    assert (mine[0] == theirs[0], mine[1] == theirs[1]) == (True, False)
    swapped = request(0, 40)
    swapped.prompt = (*one.prompt[16:32], *one.prompt[16:32])
    assert page_keys(swapped, 2)[1] != mine[1]


@pytest.mark.parametrize("window", [1, 2, 8, 16, 17, 64])
@pytest.mark.parametrize("budget", [1, 7, 16, 40])
def test_between_steps_a_sliding_layer_keeps_the_window_and_no_more(window, budget):
    one = request(0, prompt=90, new=60)
    sched = scheduler(
        pages_for(149), window_pages(window) + 1 + pages_for(budget), window, budget, 1
    )
    sched.add(one)
    while sched.unfinished:
        run(sched, sched.schedule())
        if one.finish_reason is None:
            seen = range(max(0, one.cached - window + 1), one.cached)
            needed = {position // PAGE for position in seen}
            held = {j for j, page in enumerate(one.sliding) if page != GONE}
            touched = {(one.cached - 1) // PAGE} if one.cached % PAGE else set()
            assert needed <= held <= needed | touched
            assert sched.blocks.sliding.used == len(held) <= window_pages(window)
        sched.blocks.check(sched.running)
    assert sched.blocks.full.used == sched.blocks.sliding.used == sched.preempted == 0


def test_what_another_request_has_computed_is_not_computed_again():
    sched = scheduler()
    first = request(0, 60, 2)
    sched.add(first)
    run(sched, sched.schedule())
    same, longer, other = request(0, 60, 2), request(0, 70, 2), request(1, 60, 2)
    sched.add(same)
    sched.add(longer)
    sched.add(other)
    longer.id, other.id, same.id = 2, 3, 1
    assert shown(sched.schedule()) == [(0, 60, 1), (1, 48, 12), (2, 48, 22), (3, 0, 29)]
    assert [one.found for one in (first, same, longer, other)] == [0, 48, 48, 0]
    sched.blocks.check(sched.running)
    assert same.full[:3] == first.full[:3] == longer.full[:3]
    # After 48 tokens a window of 20 sees pages 1 and 2; the first request has given back page 1.
    assert first.sliding[:2] == [GONE, GONE]
    assert same.sliding[:3] == longer.sliding[:3] == [GONE, 1, first.sliding[2]]


def test_pages_are_found_after_their_request_has_ended_until_they_are_needed():
    sched = scheduler(full=8, sliding=8)
    sched.add(request(0, 40))
    run(sched, sched.schedule())
    again = request(0, 40)
    sched.add(again)
    [chunk] = sched.schedule()
    assert (chunk.start, again.found) == (32, 32)
    run(sched, [chunk])
    sched.add(request(1, 110))
    run(sched, sched.schedule())
    run(sched, sched.schedule())
    last = request(0, 40)
    sched.add(last)
    sched.schedule()
    assert last.found < 32


def test_sliding_layers_need_the_pages_of_the_window_alone():
    sched = scheduler(window=WINDOW)
    first = request(0, 100, 1)
    sched.add(first)
    while sched.unfinished:
        run(sched, sched.schedule())
    pool = sched.blocks.sliding
    keys = page_keys(first, 6)
    for key in keys[:4]:  # as if they had been taken for something else
        page = pool._page_of.pop(key)
        del pool._key_of[page], pool._kept[page]
        pool._blank.append(page)
    same, shorter = request(0, 100), request(0, 60)
    sched.add(same)
    sched.add(shorter)
    sched.schedule()
    # After 96 tokens the window of 20 sees pages 4 and 5; after 48 it would need page 1 and 2.
    assert (same.found, shorter.found) == (96, 0)


def test_without_sharing_nothing_is_found():
    sched = scheduler(shares=False)
    for _ in range(2):
        sched.add(request(0, 40))
        run(sched, sched.schedule())
    assert sched.running == []
    assert sched.blocks.full._page_of == {}


def test_a_request_for_logits_starts_from_nothing():
    sched = scheduler()
    sched.add(request(0, 40))
    run(sched, sched.schedule())
    sched.add(Request(tuple(range(40)), 40, all_logits=True, id=1))
    assert shown(sched.schedule()) == [(1, 0, 40)]


def test_the_check_of_pages_can_fail():
    sched = scheduler(4, 4)
    one = request(0, 20, 20)
    sched.add(one)
    sched.schedule()
    sched.blocks.check([one])
    one.full[0] = one.full[1]
    with pytest.raises(AssertionError):
        sched.blocks.check([one])


def test_a_request_that_can_never_fit_is_known():
    blocks = Blocks(full=4, sliding=3, window=WINDOW)
    assert blocks.can_hold(request(0, 60, 5))
    assert not blocks.can_hold(request(0, 60, 6))
    assert not Blocks(40, 2, WINDOW).can_hold(request(0, 60, 5))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=6),
    window=st.integers(1, 50),
)
def test_what_is_found_is_what_was_computed(lengths, window):
    """A page that is shared holds the tokens that its new holder has there."""
    sched = scheduler(40, 40, window, tokens=17)
    said: dict[tuple[str, int], tuple[int, ...]] = {}
    for number, (length, family) in enumerate(lengths):
        one = Request(tuple(family * 1000 + i for i in range(length)), length + 1, id=number)
        sched.add(one)
        while sched.unfinished:
            chunks = sched.schedule()
            for page in range(one.found // PAGE):
                tokens = tuple(one.tokens(0, (page + 1) * PAGE))
                assert said["full", one.full[page]] == tokens
                if one.sliding[page] != GONE:
                    assert said["sliding", one.sliding[page]] == tokens
            for chunk in chunks:
                for page in range(chunk.start // PAGE, pages_for(chunk.stop)):
                    tokens = tuple(one.tokens(0, (page + 1) * PAGE))
                    said["full", one.full[page]] = said["sliding", one.sliding[page]] = tokens
            run(sched, chunks)
