"""read/files.py: few files open at a time, each checked when it is closed; reads of any form."""

from __future__ import annotations

import os
from pathlib import Path

from reading import error_of, ids_of, touch

from tpx.plan.spans import Copy, Span
from tpx.read import Files, files as files_module, fill


def span(file: str, nbytes: int) -> Span:
    return Span(file, 0, nbytes, (Copy("p", 0, 0, nbytes, 1, 0, 0),))


def many(tmp_path: Path, count: int) -> list[str]:
    names = [f"file-{i}" for i in range(count)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 10)
    return names


def test_few_of_many_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "MOST_OPEN", 3)
    names, before = many(tmp_path, 8), len(os.listdir("/proc/self/fd"))
    with Files(tmp_path, ids_of(tmp_path)) as source:
        for name in [*names, names[0]]:
            data = bytearray(60)
            fill(source, span(name, 60), [memoryview(data)])
            assert data == name.encode() * 10
            assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_closed_to_make_room_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "MOST_OPEN", 1)
    one, two = many(tmp_path, 2)
    with Files(tmp_path, ids_of(tmp_path)) as source:
        fill(source, span(one, 60), [memoryview(bytearray(60))])
        touch(tmp_path / one)
        error = error_of(lambda: fill(source, span(two, 60), [memoryview(bytearray(60))]))
    assert error.message == f"`{one}` changed while it was loaded: it was written to"


def test_more_buffers_than_one_call_takes(tmp_path):
    data = os.urandom(3000)
    (tmp_path / "file").write_bytes(data)
    buffers = [bytearray(n % 3) for n in range(3001)]
    with Files(tmp_path, ids_of(tmp_path)) as source:
        fill(source, span("file", 3000), [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data
