"""Results in a file, one JSON object a line, to which an interrupted job goes on adding.

A line is a result, and whole or cut off: what a job that was killed has left behind the last whole
line is no result. What the results were made with is in a file beside it, OUTPUT.run.json, so that
every line is a result. Knows no model and no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .errors import LaunchError, RequestError
from .params import is_whole
from .results import Completion, Result

PROGRESS = "requests"  # rank 0's record of progress, beside those of the load
SYNC = 5.0  # seconds between two times that results are put on the disk
PATIENCE = 3.0  # seconds for a job that was killed to let go of the file
ANEW = "else give another `--output`, or start over: `--restart`"
REMOVE = "give another file, or remove this one yourself"


class Done(NamedTuple):
    """What a file of results has. digests: of the requests, by id. whole: bytes of whole lines.
    torn: bytes behind them."""

    digests: dict[str | int, str]
    whole: int = 0
    torn: int = 0


class Made(NamedTuple):
    """What results were made with. weights: the model's digest. flags: what the command line says
    where a request does not, by option."""

    model: str
    weights: str
    flags: dict[str, Any]


def beside(path: str) -> Path:
    return Path(f"{path}.run.json")


def check_output(path: str, source: str) -> None:
    """Raises RequestError where `path` cannot be written, or is the file of requests."""
    target, folder = Path(path), Path(path).absolute().parent
    if target.resolve() == Path(source).resolve() or same(path, source):
        raise RequestError(
            f"`{path}` is both `--input` and `--output`", "give another file: `--output FILE`"
        )
    if not folder.is_dir():
        raise RequestError(f"there is no folder `{folder}`", f"make it: `mkdir -p {folder}`")
    if os.path.lexists(target) and not target.is_file():
        raise RequestError(f"`{path}` is no file", "give a file: `--output FILE`")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise RequestError(
            f"`{path}` cannot be written: Permission denied", "give another file: `--output FILE`"
        )


def same(one: str, other: str) -> bool:
    with suppress(OSError):
        return os.path.samefile(one, other)
    return False


def read_made(path: str) -> Made | None:
    """None where nothing is beside the file. Raises RequestError."""
    try:
        return Made(**json.loads(beside(path).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise RequestError(
            f"`{beside(path)}`, which says what made `{path}`, cannot be read", REMOVE
        ) from None


def look(path: str, restart: bool) -> tuple[Done, Made | None]:
    """What is there to go on from. restart: nothing is; only results may be replaced."""
    made = read_made(path)
    size = Path(path).stat().st_size if Path(path).exists() else 0
    if size and made is None:
        raise RequestError(
            f"`{path}` has something in it, and no `{beside(path)}` says that it is results",
            REMOVE,
        )
    if restart or not size:
        return Done({}, 0, size), made
    with open(path, "rb") as file:
        lock(file.fileno(), path)
        return read_done(path), made


def read_done(path: str) -> Done:
    """Raises RequestError where a whole line is no result, or a result is there twice."""
    found: dict[str | int, str] = {}
    whole = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            # A zero is where the disk's power went before what was written was on it.
            if not line.endswith(b"\n") or b"\0" in line:
                break
            name, digest = read_result(path, number, line)
            if name in found:
                raise RequestError(
                    f"`{path}`, line {number}: `{name}` is there twice", f"remove one; {ANEW}"
                )
            found[name] = digest
            whole += len(line)
        return Done(found, whole, os.fstat(file.fileno()).st_size - whole)


def read_result(path: str, number: int, line: bytes) -> tuple[str | int, str]:
    """-> the request's id and digest."""
    try:
        said = json.loads(line)
        name, digest = said["id"], said["request"]
        if (isinstance(name, str) or is_whole(name)) and isinstance(digest, str):
            return name, digest
    except (ValueError, KeyError, TypeError):
        pass
    raise RequestError(
        f"`{path}`, line {number}: this is no result of `tpx generate`", f"remove the line; {ANEW}"
    )


def begin(path: str, made: Made, done: Done) -> None:
    """Cuts off what is torn. What was made with something else is gone before that is forgotten."""
    if Path(path).exists():
        with open(path, "r+b") as file:
            lock(file.fileno(), path)
            if os.fstat(file.fileno()).st_size != done.whole + done.torn:
                raise busy(path)
            file.truncate(done.whole)
    if not done.digests:
        put(beside(path), json.dumps(made._asdict(), indent=1) + "\n")


def put(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.absolute().parent)
    except OSError as error:
        raise LaunchError(
            f"`{path}` cannot be written: {error.strerror}", "make room, or give another file"
        ) from None


def sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: int, path: str) -> None:
    """Until the file is closed. Raises RequestError where another job has it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise busy(path) from None
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return None


def busy(path: str) -> RequestError:
    return RequestError(f"another job writes `{path}`", "let it end, or give another file")


class ResultsFile:
    """Open to add results, for one process at a time. done: what is there.

    A process that is killed loses nothing that was added. What is added is on the disk with the
    first result that comes SYNC seconds after the last time, and at the end: that much a power cut
    may take.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        lock(self._file, path)
        self.done = read_done(path)
        self._end = self.done.whole
        os.ftruncate(self._file, self._end)
        sync(Path(path).absolute().parent)
        self._synced = time.monotonic()

    def add(self, result: Result, digest: str) -> None:
        """Raises LaunchError where the disk is full, and leaves whole lines."""
        data = to_line(result, digest)
        with self._disk_errors():
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
            self._end += len(data)
            self.done.digests[result.id] = digest
            if time.monotonic() - self._synced >= SYNC:
                self._sync()

    def close(self) -> None:
        """Raises LaunchError where the disk has lost what was written."""
        with self._disk_errors():
            self._sync()
        os.close(self._file)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise LaunchError(
                f"`{self.path}` cannot be written: {error.strerror}",
                "make room, and type the same command: what is in the file is kept",
                exit_code=4,
            ) from None


def to_line(result: Result, digest: str) -> bytes:
    completions = [to_json(completion) for completion in result.completions]
    said = {"id": result.id, "completions": completions, "request": digest}
    return json.dumps(said, ensure_ascii=False).encode() + b"\n"


def to_json(completion: Completion) -> dict[str, Any]:
    """logprobs, where they were asked for: of each token, and as [id, logprob] of the likeliest."""
    text, token_ids, reason, likely = completion
    said = {"text": text, "token_ids": token_ids, "finish_reason": reason}
    if likely is None:
        return said
    return said | {"logprobs": [{"logprob": one.logprob, "top": one.top} for one in likely]}
