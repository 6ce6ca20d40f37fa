"""Watches the ranks beside torch's agent: when each ended, whether they still advance, and that all
are gone in time. Kills only processes that it saw start."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import LaunchError
from .beat import COMPILE
from .examine import examine
from .memory import resident
from .progress import read_all
from .ranks_here import Told, parent_of, processes_of, read_told
from .run_files import RunFiles

TICK = 0.1  # seconds between two looks
SLOW = {COMPILE: 5}  # how many times as long as a step something may take between two ticks
NOTICE = 1.0  # seconds after Ctrl-C until it is said what is waited for


class Death(NamedTuple):
    """code: negative for a signal; None where the agent was faster to take it. time_ns: of the end,
    or where the agent was faster of the last sign of life."""

    code: int | None
    time_ns: int


class Limits(NamedTuple):
    """Seconds: until ranks are killed that were told to end; until a job that does not advance is a
    hang, 0 for never."""

    grace: float
    hang: float


class Patience:
    """With a job that does not move; limit: seconds, 0 for no end."""

    def __init__(self, limit: float):
        self._limit, self._since = limit, 0.0
        self._state: object = None

    def is_over(self, state: object, waits: bool, now: float, times: int = 1) -> bool:
        """state: of all that moves. waits: whether a rank waits for others; where none does, a job
        may take any time. times: as long as usual."""
        if state != self._state:
            self._state, self._since = state, now
        return waits and 0 < self._limit * times <= now - self._since


class Process(NamedTuple):
    pid: int
    pidfd: int


class Watch:
    """Of the ranks of one job, while `watching`. folder: the run's. heard: bytes that the ranks
    have printed. say: shows a line to the user.

    hang: the error of a job that did not advance. deaths and held (bytes of memory, shortly before
    its end) are of the last attempt's ranks. failed: set once it is known that ranks failed.
    """

    def __init__(
        self,
        folder: Path,
        files: RunFiles,
        limits: Limits,
        heard: Callable[[], int],
        say: Callable[[str], None],
    ):
        self.hang: LaunchError | None = None
        self.deaths: dict[int, Death] = {}
        self.held: dict[int, int] = {}
        self.failed = False
        self._folder, self._files, self._limits = folder, files, limits
        self._heard, self._say = heard, say
        self._alive: dict[int, Process] = {}
        self._sessions: set[int] = set()
        self._told: dict[int, Told] = {}
        self._attempt = 0
        self._patience = Patience(limits.hang)
        self._deadline: float | None = None
        self._notice: float | None = None
        self._signals = 0
        self._wake_read, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpx-watch", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In the main thread, since signals come there; afterwards no process of a rank is left,
        where the job did not end well."""
        handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in HANDLED}
        before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            os.write(self._wake, b"\0")
            self._thread.join()
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():  # the agent's raise wherever they come
                signal.signal(number, handler)
            self._look()
            self._reap()
            os.close(self._wake_read)
            os.close(self._wake)

    def _run(self) -> None:
        while not self._end.is_set():
            self._wait()
            self._look()
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                self._kill("they had not ended in time")
            if self._notice is not None and now >= self._notice:
                self._notice = None
                self._tell_what_is_waited_for(now)
            if self._deadline is None and self._hangs(now):
                self._report_hang()

    def _wait(self) -> None:
        """Until a rank ends or a signal comes, for a tick at most."""
        poll = select.poll()
        for descriptor in (self._wake_read, *(process.pidfd for process in self._alive.values())):
            poll.register(descriptor, select.POLLIN)
        poll.poll(TICK * 1000)
        try:
            for number in os.read(self._wake_read, 64):
                self._hear_signal(number)
        except BlockingIOError:
            return

    def _hear_signal(self, number: int) -> None:
        if number not in HANDLED:
            return
        self._files.event("signal", signal=signal.Signals(number).name)
        self._signals += 1
        if self._signals > 1:
            self._kill("a second signal came")
        else:
            now = time.monotonic()
            self._deadline, self._notice = now + self._limits.grace, now + NOTICE

    def _tell_what_is_waited_for(self, now: float) -> None:
        if self._alive and self._deadline is not None and self._deadline > now:
            count = f"{len(self._alive)} rank{'s' * (len(self._alive) > 1)}"
            self._say(f"{count} may take {self._deadline - now:.0f} s more to end; "
                      "a second Ctrl-C ends them now")  # fmt: skip

    def _look(self) -> None:
        """Takes in who has started, who has ended, and how far each is."""
        told = read_told(self._folder / "beats")
        for rank, process in list(self._alive.items()):
            self.held[rank] = resident(process.pid) or self.held.get(rank, 0)
            if has_ended(process):
                self._bury(rank, Death(exit_code(process), time.time_ns()))
                os.close(process.pidfd)
                del self._alive[rank]
        for each in told:
            if each.pid not in self._sessions:
                self._begin(each)
        self._told = {each.rank: each for each in told}

    def _begin(self, told: Told) -> None:
        if told.attempt > self._attempt:
            self._attempt, self.hang, self._deadline = told.attempt, None, None
            self.deaths.clear()
        self._sessions.add(told.pid)
        self._files.event("rank", rank=told.rank, pid=told.pid, attempt=told.attempt)
        process = child(told.pid)
        if process is not None:
            self._alive[told.rank] = process
        else:
            record = self._folder / "beats" / f"{told.attempt}-{told.rank}"
            self._bury(told.rank, Death(None, record.stat().st_mtime_ns))

    def _bury(self, rank: int, death: Death) -> None:
        self.deaths[rank] = death
        self._files.event("ended", rank=rank, exit_code=death.code)
        if death.code and self._deadline is None:
            self._deadline = time.monotonic() + self._limits.grace

    def _hangs(self, now: float) -> bool:
        """Whether a rank waits for others, and nothing has moved for too long."""
        states = read_all(self._folder / "progress")
        state = (self._told, [s.done for s in states], self._heard(), set(self._alive))
        told = [self._told[rank] for rank in self._alive if rank in self._told]
        times = max((SLOW.get(each.phase, 1) for each in told), default=1)
        return self._patience.is_over(state, any(each.waits for each in told), now, times)

    def _report_hang(self) -> None:
        alive = {rank: process.pid for rank, process in self._alive.items()}
        ended = {rank: death.code for rank, death in self.deaths.items()}
        try:
            self.hang = examine(self._folder, alive, ended, self._limits.hang)
        except OSError as error:  # a full disk
            said = (
                f"nothing has moved for {self._limits.hang:.0f} s, and why cannot be written down"
            )
            self.hang = LaunchError(f"{said}: {error.strerror}", exit_code=6)
        self._files.event("hang", error=self.hang.message)
        self._kill("the job hangs")

    def _kill(self, why: str) -> None:
        if self._alive:
            self._files.event("kill", ranks=sorted(self._alive), why=why)
        for process in self._alive.values():
            kill_group(process.pid)
        self._deadline = time.monotonic() + self._limits.grace  # for those that start meanwhile

    def _reap(self) -> None:
        """Ends what ranks of a job that failed have started and left behind."""
        if self._signals or self.failed:
            for pid in processes_of(self._sessions):
                kill(pid)


HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # as the agent does


def child(pid: int) -> Process | None:
    """None where it has ended, and the agent has taken it."""
    if parent_of(pid) != os.getpid():
        return None
    try:
        return Process(pid, os.pidfd_open(pid))
    except ProcessLookupError:
        return None


def has_ended(process: Process) -> bool:
    poll = select.poll()
    poll.register(process.pidfd, select.POLLIN)
    return bool(poll.poll(0))


def exit_code(process: Process) -> int | None:
    """Looks at it, and leaves it to the agent to take it."""
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        found = os.waitid(os.P_PIDFD, process.pidfd, how)
    except ChildProcessError:
        return None
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def kill_group(pid: int) -> None:
    """A rank leads its own process group, with what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
