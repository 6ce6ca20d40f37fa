"""AsyncEngine: requests that come one by one, from any number of coroutines, on one engine.

The first rank's event loop hears them; a thread steps the engine there, and tells the other ranks
between two steps. Owns the LLM while it is open.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from types import TracebackType

import torch

from .answer import Answer, Said
from .errors import RequestError
from .feed import Asked, Told, tell
from .llm import LLM
from .params import Request
from .results import Piece

IDLE_SECONDS = 30.0  # after which the first rank says that nothing came: others wait no longer


class _Stream:
    """One request's pieces, from the stepping thread to the coroutine that asked. number: in the
    order in which all ranks were told."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.pieces = asyncio.Queue[Piece | BaseException]()
        self.number = -1

    def put(self, piece: Piece | BaseException) -> None:
        if not self.loop.is_closed():  # else nobody waits any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class AsyncEngine:
    """On every rank: `async with tpx.AsyncEngine(llm) as engine`. The first rank (`engine.leads`)
    asks; the others call `engine.follow()`, which returns when the first one closes. The LLM is its
    own until then."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self.session = llm.lend(self)
        self.world = llm.groups.host("world")
        self.leads = self.world.rank == 0
        self._change = threading.Condition()
        self._came = list[tuple[Asked, _Stream]]()
        self._left = list[_Stream]()
        self._closed = False
        self._error: BaseException | None = None
        self._answers = dict[int, list[Answer]]()  # by the number of the request
        self._streams = dict[int, _Stream]()
        self._count = 0
        if self.leads:
            self._thread = threading.Thread(target=self._serve, name="tpx.AsyncEngine", daemon=True)
            self._thread.start()

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of a request's continuations as they are computed. Leaving it early gives the
        request up. Raises RequestError."""
        self._check_open()
        asked = self.llm.check(request, self._count)
        stream = _Stream(asyncio.get_running_loop())
        with self._change:
            self._check_open()  # once more: the thread may have ended meanwhile
            self._came.append((asked, stream))
            self._change.notify()
        unfinished = asked.params.n
        try:
            while unfinished:
                piece = await stream.pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                unfinished -= piece.completion is not None
                yield piece
        finally:
            if unfinished:
                self._say(lambda: self._left.append(stream))

    def follow(self) -> None:
        """Computes what the first rank asks for, until it closes."""
        if self.leads:
            raise RequestError(
                "the first rank follows nobody", "call `engine.follow()` where not `engine.leads`"
            )
        self._run()

    async def close(self) -> None:
        """Gives up what is left, and lets the other ranks and the LLM go."""
        if self.leads:
            self._say(lambda: setattr(self, "_closed", True))
            await asyncio.to_thread(self._thread.join)
        self.llm.take_back(self)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if not self.leads:
            raise RequestError("only the first rank asks", "call `engine.follow()` on the others")
        if self._error is not None:
            raise self._error
        if self._closed:
            raise closed()

    def _say(self, change: Callable[[], object]) -> None:
        with self._change:
            change()
            self._change.notify()

    def _serve(self) -> None:
        """The thread of the first rank."""
        try:
            if self.llm.device.type == "cuda":
                torch.cuda.set_device(self.llm.device)
            self._run()
        except BaseException as error:  # whoever waits for a piece is told, whatever it is
            with self._change:
                self._error = error
                streams = [*self._streams.values(), *(stream for _, stream in self._came)]
            for stream in streams:
                stream.put(error)

    def _run(self) -> None:
        while True:
            told = tell(self.world, self._hear)
            self._take(told)
            if told.closed:
                return
            if self.session.open:
                self._deliver({answer.request.id for answer in self.session.step()})

    def _hear(self) -> Told:
        """What came since the last step; waits where there is nothing to compute."""
        with self._change:
            if not self.session.open:
                self._change.wait_for(
                    lambda: self._came or self._left or self._closed, timeout=IDLE_SECONDS
                )
            came, left = self._came, self._left
            self._came, self._left = [], []
            for number, (_, stream) in enumerate(came, start=self._count):
                stream.number = number
                self._streams[number] = stream
            asked = [one for one, _ in came]
            return Told(asked, [stream.number for stream in left], self._closed)

    def _take(self, told: Told) -> None:
        for one in told.asked:
            answers = self.llm.answers_to(one)
            self.session.put(answers, streamed=True)
            self._answers[self._count] = answers
            self._count += 1
        for number in told.given_up:
            self._forget(number)
        for number in list(self._answers) if told.closed else ():
            if number in self._streams:
                self._streams[number].put(closed())
            self._forget(number)

    def _forget(self, number: int) -> None:
        self.session.cancel(self._answers.pop(number, []))
        self._streams.pop(number, None)

    def _deliver(self, ended: set[int]) -> None:
        """Sends on what the last step has added, and forgets the requests that are done."""
        for number, answers in list(self._answers.items()):
            for answer in answers if number in self._streams else ():
                for piece in pieces(answer, answer.request.id in ended):
                    self._streams[number].put(piece)
            if all(answer.done is not None for answer in answers):
                self._forget(number)


def pieces(answer: Answer, ended: bool) -> Iterator[Piece]:
    """What the last step has added; the last piece holds the whole."""
    said = answer.take_said() or ([Said("", [])] if ended else [])
    for place, (text, ids) in enumerate(said, start=1):
        yield Piece(answer.choice, text, ids, answer.done if place == len(said) else None)


def closed() -> RequestError:
    return RequestError("the AsyncEngine is closed", "make a new one: `tpx.AsyncEngine(llm)`")
