"""A file of which some blocks are there, and the manifest that says which.

The file has its whole size from the start; what was not fetched is a hole. Its manifest is text
that only grows while blocks come: one line a block, written after the block is on the disk, so
that a process may be killed at any time. A last line seals it: the file's time of change then.
Without a seal that fits, every block is hashed before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from .source import Found

BLOCK = 1 << 20
LINE = re.compile(
    r"(?:block (\d{1,15}) ([0-9a-f]{64})|header (\d{1,15}) ([0-9a-f]{64})|seal (\d{1,20}))\n"
)


class Stamp(NamedTuple):
    """The header's bytes and their sha256."""

    nbytes: int
    digest: str


class Manifest(NamedTuple):
    """found: the file it belongs to. blocks: sha256 of each one that is there, by its number.
    seal: the file's mtime in ns when the last one had come; None: a process was killed."""

    found: Found
    header: Stamp | None
    blocks: dict[int, str]
    seal: int | None


def read_manifest(path: Path) -> Manifest | None:
    """None where there is none, or none that can be read. A torn last line counts for nothing."""
    try:
        first, *lines = path.read_text().splitlines(keepends=True)
        found = Found(**json.loads(first))
    except (OSError, ValueError, TypeError):
        return None
    header, blocks, seal = None, dict[int, str](), None
    for line in lines:
        seal = None  # it holds for what stands before it, and nothing may follow
        if (match := LINE.fullmatch(line)) is None:
            break
        if match[1]:
            blocks[int(match[1])] = match[2]
        elif match[3]:
            header = Stamp(int(match[3]), match[4])
        else:
            seal = int(match[5])
    return Manifest(found, header, blocks, seal)


def trusted(path: Path, manifest: Manifest | None, found: Found) -> Manifest | None:
    """The manifest, where it is of this content and the file has not changed since it was sealed"""
    if manifest is None or manifest.found != found or not path.is_file():
        return None
    stat = path.stat()
    return manifest if (stat.st_size, stat.st_mtime_ns) == (found.size, manifest.seal) else None


class SparseFile:
    """The file at `path`, open to take blocks; one process at a time, any number of its threads.

    Made where it is not there. Blocks that are not what the manifest says are dropped from it.
    """

    def __init__(self, path: Path, manifest: Path, found: Found):
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.parent.mkdir(parents=True, exist_ok=True)
        self.found, self._manifest = found, manifest
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        listed = read_manifest(manifest)
        sealed = trusted(path, listed, found)
        os.ftruncate(self._file, found.size)
        if sealed is None:
            sealed = self._believed(listed)
        self.header, self.blocks = sealed.header, dict(sealed.blocks)
        self._log = self._start_log()

    def __enter__(self) -> SparseFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        """What is listed is on the disk, also after an error: the seal says so."""
        os.write(self._log, f"seal {os.fstat(self._file).st_mtime_ns}\n".encode())
        os.fsync(self._log)
        os.close(self._log)
        os.close(self._file)

    def write(self, data: bytes, at: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, memoryview(data)[done:], at + done)

    def add_header(self, data: bytes) -> None:
        self.write(data, 0)
        self.header = Stamp(len(data), hashlib.sha256(data).hexdigest())
        self._add([f"header {self.header.nbytes} {self.header.digest}\n"])

    def add_blocks(self, first: int, digests: Iterable[str]) -> None:
        """Lists blocks that were written, from number `first` on."""
        found = dict(enumerate(digests, first))
        self._add([f"block {number} {digest}\n" for number, digest in found.items()])
        self.blocks |= found

    def _add(self, lines: list[str]) -> None:
        os.fsync(self._file)
        with self._lock:
            os.write(self._log, "".join(lines).encode())

    def _believed(self, listed: Manifest | None) -> Manifest:
        """What the file holds of what was listed, by its hashes."""
        if listed is None or listed.found != self.found:
            return Manifest(self.found, None, {}, None)
        blocks = {
            number: digest
            for number, digest in listed.blocks.items()
            if number * BLOCK < self.found.size and self._digest(number * BLOCK, BLOCK) == digest
        }
        header = listed.header
        if header is not None and self._digest(0, header.nbytes) != header.digest:
            header = None
        return Manifest(self.found, header, blocks, None)

    def _digest(self, at: int, nbytes: int) -> str:
        return hashlib.sha256(os.pread(self._file, nbytes, at)).hexdigest()

    def _start_log(self) -> int:
        """The manifest anew, in one piece, without a seal until this object lets go of it."""
        lines = [json.dumps(self.found._asdict()) + "\n"]
        if self.header is not None:
            lines.append(f"header {self.header.nbytes} {self.header.digest}\n")
        lines += [f"block {number} {digest}\n" for number, digest in self.blocks.items()]
        fresh = self._manifest.with_name(self._manifest.name + ".new")
        fresh.write_text("".join(lines))
        os.replace(fresh, self._manifest)
        return os.open(self._manifest, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


class Hashes:
    """Hashes of the blocks of a stream that begins with one, as its bytes pass. size: of the file,
    whose last block may be shorter."""

    def __init__(self, first: int, size: int):
        self.digests: list[str] = []
        self._at, self._size, self._hash = first * BLOCK, size, hashlib.sha256()

    def feed(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            end = min((self._at // BLOCK + 1) * BLOCK, self._size)
            part, rest = rest[: end - self._at], rest[end - self._at :]
            self._hash.update(part)
            self._at += len(part)
            if self._at == end:
                self.digests.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()


def runs(numbers: Iterable[int], most: int) -> Iterator[range]:
    """The numbers, which ascend, as ranges of neighbours, each of at most `most`."""
    start = stop = None
    for number in numbers:
        if start is not None and number == stop and number - start < most:
            stop = number + 1
            continue
        if start is not None and stop is not None:
            yield range(start, stop)
        start, stop = number, number + 1
    if start is not None and stop is not None:
        yield range(start, stop)
