"""Each byte of a checkpoint once a node: what its ranks read for themselves, and what one of them
reads and gives to the others.

Ranks of a node need the same bytes where tensors are whole on each of them, where key and value
heads are repeated, and where a row of the file holds the pieces of all. Each rank makes the same
plan from the same RankPlans, so that no word passes between them before the bytes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from .device import CPU, Device
from .overlap import divide, overlaps
from .spans import GAP, Copy, Span, Window, clipped, item_bytes, spans
from .types import RankPlan

Share = Literal["auto", "always", "never"]
# Bytes of one rank's read in a round; to each rank it gives no more. On a GPU, where memory beside
# the weights is less scarce, fewer rounds: each costs about a millisecond beside its bytes.
MOST, MOST_ON_GPU = 1 << 20, 4 << 20


class Round(NamedTuple):
    """reads: what each rank of the node reads, with the copies that it keeps itself; None: nothing.
    gives[r][q]: the copies from r's read into q's shards."""

    reads: tuple[Span | None, ...]
    gives: tuple[tuple[tuple[Copy, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Made anew each time they are gone through: one round at a time is in memory.

    windows: what is read once, ascending. needs: by rank, its spans that meet them. own: bytes that
    each rank reads for itself. most: bytes of a read.
    """

    windows: tuple[Window, ...]
    needs: tuple[tuple[Span, ...], ...]
    own: tuple[int, ...]
    most: int

    def __iter__(self) -> Iterator[Round]:
        ranks = len(self.own)
        kept = zip(*(clipped(need, self._reads()) for need in self.needs), strict=True)
        for dealt in self._dealt():
            reads: list[Span | None] = [None] * ranks
            gives: list[tuple[tuple[Copy, ...], ...]] = [((),) * ranks] * ranks
            for (window, reader), copies in zip(dealt, islice(kept, len(dealt)), strict=True):
                reads[reader] = Span(*window, copies[reader])
                gives[reader] = copies
            yield Round(tuple(reads), tuple(gives))

    def __len__(self) -> int:
        return sum(1 for _ in self._dealt())

    def bytes_read(self) -> tuple[int, ...]:
        """By rank, in all rounds."""
        total = [0] * len(self.own)
        for dealt in self._dealt():
            for window, reader in dealt:
                total[reader] += window.nbytes
        return tuple(total)

    def _reads(self) -> Iterator[Window]:
        for file, offset, nbytes in self.windows:
            for start in range(0, nbytes, self.most):
                yield Window(file, offset + start, min(self.most, nbytes - start))

    def _dealt(self) -> Iterator[list[tuple[Window, int]]]:
        """A round's reads, each with its reader: the longest goes to the rank that has read the
        least, so that ranks end within one read of each other, or as far apart as their own reads
        put them."""
        reads, load = self._reads(), list(self.own)
        while windows := list(islice(reads, len(load))):
            ranks = sorted(range(len(load)), key=load.__getitem__)
            longest = sorted(range(len(windows)), key=lambda i: -windows[i].nbytes)
            readers = dict(zip(longest, ranks, strict=False))
            for i, rank in readers.items():
                load[rank] += windows[i].nbytes
            yield [(window, readers[i]) for i, window in enumerate(windows)]


class Choice(NamedTuple):
    """Whether the ranks share. alone, once: estimated seconds of the slowest one, where each reads
    for itself, and where each byte is read once."""

    shared: bool
    alone: float
    once: float


class NodePlan(NamedTuple):
    """own: the spans that a rank reads for itself. rounds: none where nothing is shared.

    bytes_read: by rank, own and rounds. alone, bytes_alone: all of a rank's spans, which it reads
    where nothing is shared. bytes_once: by rank, where each byte is read once.
    """

    own: tuple[tuple[Span, ...], ...]
    rounds: Rounds
    bytes_read: tuple[int, ...]
    alone: tuple[tuple[Span, ...], ...]
    bytes_alone: tuple[int, ...]
    bytes_once: tuple[int, ...]
    choice: Choice


def most_of(device: Device) -> int:
    """Bytes of a read that is given to others."""
    return MOST_ON_GPU if device.backend == "nccl" else MOST


def plan_node(
    rank_plans: Sequence[RankPlan],
    share: Share = "auto",
    gap: int = GAP,
    *,
    most: int | None = None,
    device: Device = CPU,
) -> NodePlan:
    """How the ranks of one node read; `rank_plans` are theirs, in order.

    `auto` shares where that takes less time by the device's figures. most: a multiple of 4096;
    None: most_of(device).
    """
    most = most_of(device) if most is None else most
    assert most % 4096 == 0 < most, f"{most=}"
    alone = tuple(tuple(spans(plan, gap)) for plan in rank_plans)
    items = [{name: item_bytes(s.dtype) for name, s in p.shards.items()} for p in rank_plans]
    windows = overlaps(alone, items, gap)
    parts = [divide(mine, sizes, windows, gap) for mine, sizes in zip(alone, items, strict=True)]
    own = tuple(part.own for part in parts)
    nbytes = tuple(map(_nbytes, own))
    rounds = Rounds(tuple(windows), tuple(part.met for part in parts), nbytes, most)
    bytes_once = tuple(a + b for a, b in zip(nbytes, rounds.bytes_read(), strict=True))
    bytes_alone = tuple(map(_nbytes, alone))
    kept = sum(map(_kept, alone)) - sum(map(_kept, own))
    choice = _choose(rounds, bytes_alone, bytes_once, kept, share, device)
    if choice.shared:
        return NodePlan(own, rounds, bytes_once, alone, bytes_alone, bytes_once, choice)
    rounds = Rounds((), ((),) * len(alone), bytes_alone, most)
    return NodePlan(alone, rounds, bytes_alone, alone, bytes_alone, bytes_once, choice)


def _choose(
    rounds: Rounds,
    bytes_alone: Sequence[int],
    bytes_once: Sequence[int],
    kept: int,
    share: Share,
    device: Device,
) -> Choice:
    """The page cache spares the disk either way: what sharing saves is reading out of it, and what
    it costs is a collective a round, and to send what others keep: of `kept` bytes of all ranks,
    evenly, all but what a rank reads itself."""
    ranks = len(bytes_alone)
    sent = kept * (ranks - 1) / ranks**2
    start = device.start.value + device.step.value * (ranks - 1)
    alone = max(bytes_alone) / device.files.value
    once = max(bytes_once) / device.files.value
    once += sent / device.intra.value + len(rounds) * start
    shared = bool(rounds.windows) and {"auto": once < alone, "always": True, "never": False}[share]
    return Choice(shared, alone, once)


def _nbytes(found: Iterable[Span]) -> int:
    return sum(span.nbytes for span in found)


def _kept(found: Iterable[Span]) -> int:
    return sum(copy.kept for span in found for copy in span.copies)
