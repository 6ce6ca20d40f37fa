"""Who owns which page of the cache: one pool for full layers, one for sliding layers.

A page holds PAGE tokens of every layer of its kind. Knows requests' page lists and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..plan.buffers import PAGE
from .request import Request

GONE = -1  # a page that left the window


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def window_pages(tokens: int) -> int:
    """Pages that `tokens` positions in a row touch at most, wherever they begin."""
    return pages_for(tokens + PAGE - 1) if tokens else 0


def resting_pages(request: Request, window: int) -> int:
    """Sliding pages that a request holds between steps at most, and one to grow into."""
    return min(pages_for(request.most_cached), window_pages(window) + 1)


class Pool:
    """`size` pages; the lowest free one goes first."""

    def __init__(self, size: int):
        self.size = size
        self.free = list(range(size - 1, -1, -1))

    @property
    def used(self) -> int:
        return self.size - len(self.free)

    def take(self) -> int:
        return self.free.pop()

    def give(self, page: int) -> None:
        self.free.append(page)


class Blocks:
    """Hands pages to requests and takes them back.

    A full layer's pages are reserved at admission, for the request's whole life. A sliding layer's
    are taken as tokens come and given back as they leave the window, so that between steps a
    request holds the window, rounded to pages, and no more.

    window: positions that a sliding layer sees, the token itself included. step_tokens: tokens that
    one step adds at most, over all requests.
    """

    def __init__(self, full: int, sliding: int, window: int, step_tokens: int):
        self.full = Pool(full)
        self.sliding = Pool(sliding)
        self.window = window
        self.step_tokens = step_tokens
        self.promised = 0  # sliding pages that admitted requests may hold between steps

    def resting(self, request: Request) -> int:
        return resting_pages(request, self.window)

    def fits(self, request: Request) -> bool:
        room = self.sliding.size - pages_for(self.step_tokens)
        return (
            pages_for(request.most_cached) <= len(self.full.free)
            and self.promised + self.resting(request) <= room
        )

    def admit(self, request: Request) -> None:
        assert self.fits(request)
        assert not request.full
        self.promised += self.resting(request)
        request.full = [self.full.take() for _ in range(pages_for(request.most_cached))]

    def grow(self, request: Request, tokens: int) -> None:
        """Takes the sliding pages of the first `tokens` positions."""
        while len(request.sliding) < pages_for(tokens):
            request.sliding.append(self.sliding.take())

    def trim(self, request: Request) -> None:
        """Gives back the sliding pages that no later token sees."""
        first_seen = request.cached - self.window + 1
        for j in range(min(len(request.sliding), max(0, first_seen) // PAGE)):
            if request.sliding[j] != GONE:
                self.sliding.give(request.sliding[j])
                request.sliding[j] = GONE

    def release(self, request: Request) -> None:
        self.promised -= self.resting(request)
        for page in request.full:
            self.full.give(page)
        for page in request.sliding:
            if page != GONE:
                self.sliding.give(page)
        request.full, request.sliding = [], []

    def check(self, requests: Iterable[Request]) -> None:
        """Asserts that every page is either free or owned once."""
        requests = list(requests)
        for pool, owned in (
            (self.full, [page for r in requests for page in r.full]),
            (self.sliding, [page for r in requests for page in r.sliding if page != GONE]),
        ):
            assert sorted(pool.free + owned) == list(range(pool.size)), f"{pool.free=} {owned=}"
        assert self.promised == sum(self.resting(request) for request in requests)
