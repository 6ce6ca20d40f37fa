"""Keeps what each rank prints in a file, and shows it: as it comes where the output is no terminal,
else in whole lines with their ranks, beside the bar of progress."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from rich.console import Console

from .lines import HOLD, Lines, spans

CHUNK = 1 << 16
LEFT = 2.0  # seconds for what the ranks have left in the pipes, which a process of theirs may fill
TICK = 0.05  # seconds between two looks at lines that wait
COLOURS = (36, 33, 32, 35, 34, 31)  # of ranks, in turn
STREAMS = {"out": 1, "err": 2}


class Source(NamedTuple):
    """One rank's stream; read, write: the ends of a pipe."""

    local_rank: int
    stream: str
    read: int
    write: int


class Raw:
    """Passes bytes on, in whole lines unless the rest does not come."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._held: dict[int, tuple[float, bytes]] = {}

    def hear(self, rank: int, data: bytes, now: float) -> None:
        since, held = self._held.pop(rank, (now, b""))
        whole, newline, rest = (held + data).rpartition(b"\n")
        if rest:
            self._held[rank] = (now if newline else since, rest)
        write_all(self._descriptor, whole + newline)

    def flush(self, now: float, end: bool = False) -> None:
        for rank, (since, rest) in list(self._held.items()):
            if end or now - since >= TICK:
                del self._held[rank]
                write_all(self._descriptor, rest)

    @property
    def waiting(self) -> bool:
        return bool(self._held)


class Shown:
    """Writes lines with their ranks to a console, which may draw a bar below them."""

    def __init__(self, lines: Lines, console: Console):
        self._lines, self._console = lines, console

    def hear(self, rank: int, data: bytes, now: float) -> None:
        self._lines.hear(rank, data, now)

    def flush(self, now: float, end: bool = False) -> None:
        found = self._lines.take(now, end)
        if found:
            coloured = self._console.is_terminal and not self._console.no_color
            text = "\n".join(f"{prefix(ranks, coloured)} {line}" for ranks, line in found)
            self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @property
    def waiting(self) -> bool:
        return self._lines.waiting


def prefix(ranks: tuple[int, ...], coloured: bool) -> str:
    word = f"[{spans(ranks)}]"
    return f"\x1b[{COLOURS[ranks[0] % len(COLOURS)]}m{word}\x1b[0m" if coloured else word


View = Raw | Shown


class Logs:
    """The pipes of a machine's ranks, and the thread that empties them until `close`.

    views: of each stream that is kept; one that is not named goes where this process's goes.
    """

    def __init__(self, folder: Path, nproc: int, views: Mapping[str, View]):
        self.heard = 0  # bytes, of all ranks
        self.full: str | None = None  # why nothing is kept any more
        self._folder, self._views = folder, dict(views)
        self._ranks = list(range(nproc))
        self._files: dict[tuple[int, str], IO[bytes]] = {}
        self._sources = [
            Source(local, stream, *os.pipe()) for local in range(nproc) for stream in views
        ]
        self._selector = selectors.DefaultSelector()
        for source in self._sources:
            os.set_blocking(source.read, False)
            self._selector.register(source.read, selectors.EVENT_READ, source)
        self._end, self._deadline = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run, name="tpx-logs", daemon=True)
        self._thread.start()

    def paths(self, stream: str, ranks: Mapping[int, int]) -> dict[int, str]:
        """Where each local rank shall write the stream, "" for where this process does. ranks: the
        rank of each local rank from now on."""
        self._ranks = [ranks[local] for local in range(len(ranks))]
        found = dict.fromkeys(ranks, "")
        for source in self._sources:
            if source.stream == stream:
                found[source.local_rank] = f"/proc/self/fd/{source.write}"
        return found

    def close(self) -> None:
        """Once the ranks have ended: shows and keeps what they have left."""
        self._deadline = time.monotonic() + LEFT
        self._end.set()
        self._thread.join()
        for source in self._sources:
            os.close(source.write)
        for key in self._selector.get_map().values():
            os.close(key.fd)
        for file in self._files.values():
            file.close()
        self._selector.close()

    def _run(self) -> None:
        over = False
        while not over:
            ending = self._end.is_set()
            waiting = any(view.waiting for view in self._views.values())
            ready = self._selector.select(0 if ending else TICK if waiting else HOLD)
            for key, _ in ready:
                self._read(key.data)
            over = ending and (not ready or time.monotonic() > self._deadline)
            self._flush(over)

    def _read(self, source: Source) -> None:
        if source.stream not in self._views:  # it broke in this round
            return
        data = os.read(source.read, CHUNK)
        self.heard += len(data)
        rank = self._ranks[source.local_rank]
        self._keep(rank, source.stream, data)
        view = self._views[source.stream]
        self._show(source.stream, partial(view.hear, rank, data, time.monotonic()))

    def _flush(self, end: bool) -> None:
        now = time.monotonic()
        for stream, view in list(self._views.items()):
            self._show(stream, partial(view.flush, now, end))

    def _show(self, stream: str, write: Callable[[], None]) -> None:
        """Where nobody reads, the ranks shall see that too: their ends of the pipes break."""
        try:
            write()
        except OSError:
            del self._views[stream]
            for source in self._sources:
                if source.stream == stream:
                    self._selector.unregister(source.read)
                    os.close(source.read)

    def _keep(self, rank: int, stream: str, data: bytes) -> None:
        """Appends to <folder>/rank<N>.<stream>, until a disk is full."""
        if self.full is not None:
            return
        try:
            if (rank, stream) not in self._files:
                path = self._folder / f"rank{rank}.{stream}"
                self._files[rank, stream] = path.open("wb", buffering=0)
            self._files[rank, stream].write(data)
        except OSError as error:
            self.full = error.strerror or str(error)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def views(
    nproc: int, prefixes: str, generates: bool, out: Console, err: Console
) -> dict[str, View]:
    """prefixes: auto (on a terminal), always or never. Text generation writes to a terminal
    itself, since rank 0 alone writes, piece by piece."""
    found: dict[str, View] = {}
    for stream, console in (("out", out), ("err", err)):
        terminal = console.is_terminal
        if generates and terminal:
            continue
        told = not generates and prefixes != "never" and (terminal or prefixes == "always")
        both = err if err.is_terminal and terminal else console  # one terminal: one bar
        if told:
            found[stream] = Shown(Lines(nproc), both)
        else:
            found[stream] = Raw(STREAMS[stream])
    return found
