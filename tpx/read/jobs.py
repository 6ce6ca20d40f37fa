"""What threads do for a GPU: what is kept as it is goes from the file to its place in one call of
C++; all else into a buffer, and into `waiting`, for the one thread that copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, Protocol

from ..plan.spans import Span, cut
from .arena import Arena
from .batches import Batch, batches
from .files import Files, Source
from .native import Part
from .readers import Job, Readers, Waiting
from .ring import Buffer, Fence, Ring

# Bytes of a job, and of a read, of which all is kept as it is or none is sent. Between two jobs
# threads wait for each other: 0.2 ms on an H100 machine with 16 cores.
SEND, READ = 32 << 20, 8 << 20


class Target(Protocol):
    @property
    def sends(self) -> bool: ...

    def send(self, parts: Sequence[Part], buffer: Buffer) -> int: ...

    def mark(self, buffer: Buffer) -> Fence | None: ...


class Piece(NamedTuple):
    """nbytes of a read from its byte `begin` on, for the arena's byte `to`."""

    read: Span
    begin: int
    to: int
    nbytes: int


def jobs(
    spans: Sequence[Span],
    source: Source,
    arena: Arena,
    ring: Ring,
    target: Target,
    waiting: Waiting,
) -> Iterator[Job]:
    """Of all spans; what is sent comes first."""
    left = list[Span]()
    if target.sends and isinstance(source, Files):
        yield from _Sends(arena, ring, source, target).jobs(spans, left)
    else:
        left += spans
    yield from _through(left, ring, waiting)


class _Sends:
    def __init__(self, arena: Arena, ring: Ring, files: Files, target: Target):
        self._arena, self._ring, self._files, self._target = arena, ring, files, target

    def jobs(self, spans: Sequence[Span], others: list[Span]) -> Iterator[Job]:
        """Of the reads that are kept as they are; puts all others into `others`."""
        for batch in batches(self._kept(spans, others), SEND):
            yield Job(batch.bytes_read, batch.bytes_kept, partial(self._load, batch))

    def _kept(self, spans: Sequence[Span], others: list[Span]) -> Iterator[Span]:
        for read in (read for span in spans for read in cut(span, READ)):
            if self._arena.places(read) is None:
                others.append(read)
            else:
                yield read

    def _load(self, batch: Batch, readers: Readers) -> None:
        with ExitStack() as stack:
            opened = {
                name: stack.enter_context(self._files.opened(name))
                for name in {read.file for _, read in batch.laid}
            }
            pieces = list(self._pieces(batch))
            while pieces and (buffer := self._ring.take()) is not None:
                with readers.reading():
                    sent = self._target.send([self._part(p, opened) for p in pieces], buffer)
                self._ring.give(buffer, self._target.mark(buffer))
                pieces = _after(pieces, sent)
                if pieces:  # says why; where it can be read now, the rest is sent
                    readers.fill(pieces[0].read, pieces[0].begin, [memoryview(bytearray(1))])

    def _pieces(self, batch: Batch) -> Iterator[Piece]:
        for _, read in batch.laid:
            begin = 0
            for to, nbytes in self._arena.places(read) or ():
                yield Piece(read, begin, to, nbytes)
                begin += nbytes

    def _part(self, piece: Piece, opened: dict[str, int]) -> Part:
        read, begin, to, nbytes = piece
        address = self._arena.data.data_ptr() + to
        return Part(opened[read.file], read.offset + begin, nbytes, address)


def _through(spans: Sequence[Span], ring: Ring, waiting: Waiting) -> Iterator[Job]:
    """A batch each, into a buffer that is then put into `waiting`."""

    def load(batch: Batch, readers: Readers) -> None:
        if (buffer := ring.take()) is not None:
            for at, read in batch.laid:
                readers.fill(read, 0, [buffer.view[at : at + read.nbytes]])
            waiting.put((batch.laid, buffer))

    for batch in batches(spans, ring.most):
        yield Job(batch.bytes_read, batch.bytes_kept, partial(load, batch))


def _after(pieces: Sequence[Piece], nbytes: int) -> list[Piece]:
    """What is left of the pieces when the first `nbytes` are sent."""
    for at, (read, begin, to, size) in enumerate(pieces):
        if nbytes < size:
            return [Piece(read, begin + nbytes, to + nbytes, size - nbytes), *pieces[at + 1 :]]
        nbytes -= size
    return []
