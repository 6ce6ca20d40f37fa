"""Which pages of the cache a request has: one pool for full layers, one for sliding layers.

A page holds PAGE tokens of every layer of its kind. A request takes pages as its tokens come; full
layers keep them all, sliding layers give back those that left the window. Pages that hold the same
tokens after the same tokens are shared. Knows no tensor.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from ..plan.buffers import PAGE
from .pool import Pool
from .request import Request

GONE = -1  # a page that left the window


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def window_pages(tokens: int) -> int:
    """Pages that `tokens` positions in a row touch at most, wherever they begin."""
    return pages_for(tokens + PAGE - 1) if tokens else 0


def page_keys(request: Request, count: int) -> list[bytes]:
    """Of its first `count` pages: a hash of all tokens up to the page's end."""
    keys = request.keys
    while len(keys) < count:
        at = len(keys) * PAGE
        tokens = array("q", request.tokens(at, at + PAGE)).tobytes()
        keys.append(blake2b(tokens, key=keys[-1] if keys else b"", digest_size=16).digest())
    return keys[:count]


class Pages(NamedTuple):
    """Pages of each pool."""

    full: int
    sliding: int


class Blocks:
    """Hands pages to requests and takes them back.

    full, sliding: pages of each pool. window: positions that a sliding layer sees, the token
    itself included. shares: whether a request starts from pages that others have filled.
    """

    def __init__(self, full: int, sliding: int, window: int, shares: bool = True):
        self.full = Pool(full)
        self.sliding = Pool(sliding)
        self.window = window
        self.shares = shares

    def first_seen(self, cached: int) -> int:
        """The first page that a sliding layer sees from the token after `cached` ones."""
        return max(0, cached - self.window + 1) // PAGE

    def alone(self, request: Request, step: int = 1) -> Pages:
        """The most that it holds when it comes forward `step` tokens at a time."""
        most = pages_for(request.most_cached)
        seen = window_pages(min(request.most_cached, self.window - 1 + step))
        return Pages(most, min(most, seen))

    def can_hold(self, request: Request) -> bool:
        """Whether the request fits when it has the cache for itself."""
        need = self.alone(request)
        return need.full <= self.full.size and need.sliding <= self.sliding.size

    def missing(self, request: Request, tokens: int) -> Pages:
        """Pages to take before its first `tokens` positions have theirs."""
        pages = pages_for(tokens)
        return Pages(max(0, pages - len(request.full)), max(0, pages - len(request.sliding)))

    def has(self, need: Pages) -> bool:
        return need.full <= self.full.free and need.sliding <= self.sliding.free

    def promised(self, request: Request) -> Pages:
        """Pages that a running request is going to take for the tokens that it has, and one."""
        return Pages(max(0, pages_for(request.length) - len(request.full)) + 1, 1)

    def takes(self, request: Request, promised: Pages) -> bool:
        """Whether a request that waits can come in beside those who are promised pages."""
        pages = pages_for(request.length)
        full = self.full.free - promised.full - pages - 1
        sliding = min(pages, window_pages(self.window)) + 1 + promised.sliding
        if sliding > self.sliding.free:
            return False
        return full >= 0 or full + self._held(request) >= 0

    def _held(self, request: Request) -> int:
        """Pages that it would share with running requests."""
        keys = page_keys(request, self._found(request))
        return sum(self.full.is_held(key) for key in keys)

    def room(self, request: Request, most: int) -> int:
        """How many of `most` tokens more there are pages for."""
        spare = min(self.full.free + len(request.full), self.sliding.free + len(request.sliding))
        return max(0, min(most, spare * PAGE - request.cached))

    def grow(self, request: Request, tokens: int) -> None:
        """Takes the pages of the first `tokens` positions."""
        need = self.missing(request, tokens)
        request.full += [self.full.take() for _ in range(need.full)]
        request.sliding += [self.sliding.take() for _ in range(need.sliding)]

    def share(self, request: Request) -> None:
        """Gives a request that comes in the pages that hold its first tokens already, all but the
        last token's: sliding layers need those of the window alone."""
        assert not request.full
        assert not request.cached
        pages = self._found(request)
        if pages:
            keys = page_keys(request, pages)
            first = self.first_seen(pages * PAGE)
            request.full = [self._hold(self.full, key) for key in keys]
            seen = [self._hold(self.sliding, key) for key in keys[first:]]
            request.sliding = [GONE] * first + seen
            request.gone, request.named = first, pages
        request.cached = request.found = pages * PAGE
        request.places += 1

    def _found(self, request: Request) -> int:
        """The most pages that a request can start from."""
        if not self.shares or request.all_logits:
            return 0
        best = seen = 0
        for number, key in enumerate(page_keys(request, (request.known - 1) // PAGE), start=1):
            if self.full.find(key) is None:
                break
            seen = seen + 1 if self.sliding.find(key) is not None else 0
            if seen >= number - self.first_seen(number * PAGE):
                best = number
        return best

    @staticmethod
    def _hold(pool: Pool, key: bytes) -> int:
        page = pool.find(key)
        assert page is not None
        pool.hold(page)
        return page

    def name(self, request: Request) -> None:
        """Says which tokens its pages hold, so that other requests find them."""
        whole = min(request.cached, request.known) // PAGE
        if not self.shares or whole <= request.named:
            return
        keys = page_keys(request, whole)
        for page in range(request.named, whole):
            self.full.name(request.full[page], keys[page])
            if page >= request.gone:
                self.sliding.name(request.sliding[page], keys[page])
        request.named = whole

    def trim(self, request: Request) -> None:
        """Gives back the sliding pages that no later token sees."""
        first = min(len(request.sliding), self.first_seen(request.cached))
        for page in range(request.gone, first):
            self.sliding.give(request.sliding[page])
            request.sliding[page] = GONE
        request.gone = max(request.gone, first)

    def release(self, request: Request) -> None:
        """Takes all its pages back, the last first: the beginning of a text is found most often."""
        for page in reversed(request.full):
            self.full.give(page)
        for page in reversed(request.sliding[request.gone :]):
            self.sliding.give(page)
        request.full, request.sliding = [], []
        request.cached = request.gone = request.named = 0

    def check(self, requests: Iterable[Request]) -> None:
        """Asserts that every page is free, or held by as many requests as name it."""
        requests = list(requests)
        self.full.check([page for r in requests for page in r.full])
        self.sliding.check([page for r in requests for page in r.sliding[r.gone :]])
