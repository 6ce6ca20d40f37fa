"""What ranks print, as whole lines: alike ones once, each with the ranks that wrote it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

HOLD = 0.1  # seconds that a line waits for the other ranks to write the same
BAR = 5.0  # seconds between two states of a line that is not ended, such as a progress bar
MOST = 1 << 16  # bytes of a line that is shown as one


class Line(NamedTuple):
    time: float
    text: str


class Lines:
    """One stream of all ranks. The lines of a rank keep their order; those that all ranks write
    within HOLD are one. ranks: how many write. fold: whether to wait for like lines at all."""

    def __init__(self, ranks: int, fold: bool = True):
        self._ranks, self._fold = ranks, fold
        self._tails: dict[int, bytes] = {}
        self._shown: dict[int, float] = {}
        self._queues: dict[int, deque[Line]] = {}

    def hear(self, rank: int, data: bytes, now: float) -> None:
        *ended, tail = (self._tails.get(rank, b"") + data).split(b"\n")
        queue = self._queues.setdefault(rank, deque())
        queue.extend(Line(now, last_state(line)) for line in ended)
        shown = self._shown.setdefault(rank, now)
        if tail and (len(tail) > MOST or now - shown >= BAR):
            queue.append(Line(now, last_state(tail)))
            tail = b"" if len(tail) > MOST else tail
        if ended or now - shown >= BAR:
            self._shown[rank] = now
        self._tails[rank] = tail

    def take(self, now: float, end: bool = False) -> list[tuple[tuple[int, ...], str]]:
        """Lines that are due, with their ranks. end: all that there is, also what is not ended."""
        if end:
            for rank, tail in self._tails.items():
                self._queues[rank].extend([Line(now, last_state(tail))] if tail else [])
            self._tails.clear()
        found = []
        while heads := {rank: queue[0] for rank, queue in self._queues.items() if queue}:
            first = min(heads, key=lambda rank: heads[rank].time)
            at, text = heads[first]
            alike = [first]
            if self._fold:
                alike = sorted(rank for rank, head in heads.items() if head.text == text)
                if len(alike) < self._ranks and now - at < HOLD and not end:
                    break
            for rank in alike:
                self._queues[rank].popleft()
            found.append((tuple(alike), text))
        return found

    @property
    def waiting(self) -> bool:
        """Whether `take` will have more without hearing more."""
        return any(self._queues.values())


def last_state(line: bytes) -> str:
    """What a terminal shows of a line that was written over."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def spans(ranks: Sequence[int]) -> str:
    """`r0`, `r0-7` or `r0,2-3`."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and found[-1][1] == rank - 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return "r" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
