"""Into memory: what is kept as it is goes from the file to its place; all else to a buffer of the
ring, and into `waiting`, for the one thread that copies: torch has threads of its own for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from queue import SimpleQueue

from ..plan.spans import Span
from .arena import Arena
from .batches import Batch, Laid, batches
from .readers import Job, Readers, Waiting
from .ring import Ring


class Host:
    def __init__(self, arena: Arena, ring: Ring):
        self._arena, self._ring = arena, ring
        self._view: memoryview = arena.data.numpy().data
        self.waiting: Waiting = SimpleQueue()

    def jobs(self, spans: Sequence[Span], most: int) -> Iterator[Job]:
        """A batch each, so that no two threads are the first to write to one huge page."""
        for batch in batches(spans, most):
            yield Job(batch.bytes_read, batch.bytes_kept, partial(self._load, batch))

    def _load(self, batch: Batch, readers: Readers) -> None:
        left = list[Laid]()
        for at, read in batch.laid:
            places = self._arena.places(read)
            if places is None:
                left.append(Laid(at, read))
            else:
                readers.fill(read, 0, [self._view[to : to + nbytes] for to, nbytes in places])
        if left and (buffer := self._ring.take()) is not None:
            for at, read in left:
                readers.fill(read, 0, [buffer.view[at : at + read.nbytes]])
            self.waiting.put((left, buffer))
