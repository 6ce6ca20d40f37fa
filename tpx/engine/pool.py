"""Pool: the pages of one kind of layer, who holds them, and what those that nobody holds still say.

Knows no request and no tensor.
"""

from __future__ import annotations

from collections import Counter, OrderedDict


class Pool:
    """`size` pages. A page may have a key, the hash of all tokens up to its end; it keeps key and
    content when its last holder gives it back, until it is taken for something else: pages
    without a key first, then those that were given back first.
    """

    def __init__(self, size: int):
        self.size = size
        self.holders = [0] * size
        self._blank = list(range(size - 1, -1, -1))
        self._kept = OrderedDict[int, None]()
        self._page_of = dict[bytes, int]()
        self._key_of = dict[int, bytes]()

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        return self.size - self.free

    def take(self) -> int:
        """A page with nothing in it. The lowest one goes first, so that what is never needed is
        never touched."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self.holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page that holds these tokens."""
        return self._page_of.get(key)

    def is_held(self, key: bytes) -> bool:
        """Whether somebody holds the page of these tokens."""
        page = self._page_of.get(key)
        return page is not None and self.holders[page] > 0

    def hold(self, page: int) -> None:
        """One holder more for a page that was found."""
        if not self.holders[page]:
            del self._kept[page]
        self.holders[page] += 1

    def name(self, page: int, key: bytes) -> None:
        """Says what a held page has in it; the first page of a key is the one that is found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def give(self, page: int) -> None:
        self.holders[page] -= 1
        if not self.holders[page]:
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._blank.append(page)

    def check(self, owned: list[int]) -> None:
        """Asserts that the pages are free or held, each as often as `owned` names it."""
        count = Counter(owned)
        held = [count[page] for page in range(self.size)]
        assert held == self.holders, f"{owned=} {self.holders=}"
        free = sorted([*self._blank, *self._kept])
        assert free == [page for page in range(self.size) if not held[page]], f"{free=} {held=}"
        assert self._page_of == {key: page for page, key in self._key_of.items()}
        assert self._kept.keys() <= self._key_of.keys()
        assert not self._key_of.keys() & set(self._blank)
