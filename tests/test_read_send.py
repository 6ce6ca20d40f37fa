"""read/jobs.py and send.cpp: what is kept as it is goes from the file to its place by C++; a read
that fails is said as Python says it."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from byte_plans import Bare
from make_checkpoint import make_checkpoint
from reading import error_of, ids_of, load_rank, one_shard
from sending import Target, built, load_as_on_gpu
from tiny import tiny_config

from tpx.ops.cpu.build import Code, open_library
from tpx.plan.prepare import prepare
from tpx.plan.spans import spans
from tpx.read import Arena, Buffer, Files, Limits, ReadStats, native
from tpx.read.native import CODE, Part

pytestmark = pytest.mark.skipif(built() is None, reason="no C++ compiler")
SEND = partial(load_as_on_gpu, library=built())
NBYTES, LIMITS = 50_001, Limits(3, 8192, 4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("send") / "model", tiny_config(vocab_size=3001))


class Counted:
    """How many reads Python made, and of how many bytes."""

    def __init__(self) -> None:
        self.reads = list[int]()

    def around(self, files: Files) -> Files:
        class Counting(Files):
            def preadv(_, file: str, buffers: Sequence[memoryview], offset: int) -> int:
                self.reads.append(sum(map(len, buffers)))
                return files.preadv(file, buffers, offset)

            def opened(_, file: str) -> Iterator[int]:
                return files.opened(file)

        return Counting(Path(), {})


@pytest.mark.parametrize(("plan", "world"), [("tp1", 1), ("tp2", 2), ("tp4-etp4", 4)])
def test_every_rank_has_the_same_bits_as_without(small, plan, world):
    prepared = prepare(str(small), plan, world)
    for rank in range(world):
        expected, stats = load_rank(prepared, rank)
        found, sent = load_rank(prepared, rank, limits=LIMITS, load=SEND)
        assert all(torch.equal(found[name], expected[name]) for name in expected | found)
        assert (sent.bytes_read, sent.bytes_kept) == (stats.bytes_read, stats.bytes_kept)
        assert sent.read_seconds > 0


def test_what_is_kept_as_it_is_is_not_read_by_python(small):
    counted = Counted()
    load_rank(prepare(str(small), "tp1", 1), 0, None, LIMITS, around=counted.around, load=SEND)
    assert counted.reads == []


def test_only_what_is_cast_is_read_by_python(tmp_path):
    shards = {**one_shard((1000,), "U8", "kept"), **one_shard((300,), "BF16", "cast")}
    (tmp_path / "file").write_bytes(os.urandom(1000))
    plan, counted = Bare(shards), Counted()
    found = [span for name in shards for span in spans(Bare({name: shards[name]}))]
    arenas = [Arena(plan, torch.float32, torch.device("cpu")) for _ in range(2)]
    for arena, library in zip(arenas, (None, built()), strict=True):
        with Files(tmp_path, ids_of(tmp_path)) as files:
            source = counted.around(files)
            load_as_on_gpu(found, source, arena, ReadStats(), LIMITS, library=library)
    assert counted.reads == [1000, 600, 600]
    for name in shards:
        assert torch.equal(arenas[0].slot(name), arenas[1].slot(name))


def load_one(folder: Path, kind: type[Target] = Target, files: type[Files] = Files) -> bytes:
    """The file's first NBYTES bytes as they come into an arena."""
    plan = Bare(one_shard((NBYTES,), "U8"))
    arena = Arena(plan, torch.bfloat16, torch.device("cpu"))
    with files(folder, ids_of(folder)) as source:
        SEND(spans(plan), source, arena, ReadStats(), LIMITS, kind=kind)
    return arena.slot("p").numpy().tobytes()


@pytest.mark.parametrize("most", [1, 4096, 5000])
def test_a_send_that_ends_early_goes_on(tmp_path, most):
    """The first send does `most` bytes of what it is given."""
    (tmp_path / "file").write_bytes(os.urandom(NBYTES))
    calls = list[int]()

    class Early(Target):
        def send(self, parts: Sequence[Part], buffer: Buffer) -> int:
            calls.append(sum(part.nbytes for part in parts))
            return super().send(
                [parts[0]._replace(nbytes=most)] if len(calls) == 1 else parts, buffer
            )

    assert load_one(tmp_path, Early) == (tmp_path / "file").read_bytes()
    assert calls == [NBYTES, NBYTES - most]


def test_a_file_that_ends_early_names_the_byte_and_the_tensor(tmp_path):
    (tmp_path / "file").write_bytes(bytes(NBYTES - 10_000))
    error = error_of(lambda: load_one(tmp_path))
    assert error.message == f"`file` ends at byte `{NBYTES - 10_000}`, inside `p`"
    assert error.hint == "the file was cut short after its header was checked; fetch it again"


def test_a_read_that_fails_names_the_byte_and_the_tensor(tmp_path):
    """As a file does that was opened for writing alone."""
    (tmp_path / "file").write_bytes(bytes(NBYTES))

    class Unreadable(Files):
        @contextmanager
        def opened(self, file: str) -> Iterator[int]:
            number = os.open(tmp_path / file, os.O_WRONLY)
            try:
                yield number
            finally:
                os.close(number)

    error = error_of(lambda: load_one(tmp_path, files=Unreadable))
    assert error.message == "`file` cannot be read at byte `0`, in `p`: Bad file descriptor"
    assert error.hint == "check the disk that holds it"


def test_an_error_of_cuda_is_raised_as_torch_words_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(NBYTES))

    def check_error(number: int) -> None:
        raise RuntimeError(f"CUDA error {number}")

    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    with pytest.raises(RuntimeError, match=r"^CUDA error 2$"):
        load_one(tmp_path, partial(Target, fails="copy"))


RUNTIME = """
#include <cstring>
extern "C" {
int cudaSetDevice(int device) { return device == 1 ? 0 : 101; }
int cudaMemcpyAsync(void* to, const void* from, size_t nbytes, int kind, void* stream) {
  if (kind != 1 || stream != reinterpret_cast<void*>(77)) return 1;
  std::memcpy(to, from, nbytes);
  return 0;
}
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventSynchronize(void*) { return 0; }
}
"""


class OnDeviceOne(NamedTuple):
    """As much of a torch.cuda.Stream as is asked for."""

    cuda_stream: int = 77
    device_index: int = 1


def test_a_sender_calls_the_runtime_on_its_device_and_stream(tmp_path, monkeypatch):
    source, data = tmp_path / "runtime.cpp", bytearray(os.urandom(10_000))
    source.write_text(RUNTIME)
    (tmp_path / "file").write_bytes(data)
    runtime = open_library(tmp_path, Code((source,), CODE.flags))
    monkeypatch.setattr(native, "cuda_runtime", lambda: runtime)
    buffer, out = (ctypes.create_string_buffer(nbytes) for nbytes in (8192, len(data)))
    with Files(tmp_path, ids_of(tmp_path)) as files, files.opened("file") as number:
        part = Part(number, 0, len(data), ctypes.addressof(out))
        sender = native.sender(OnDeviceOne())
        assert sender.send([part], ctypes.addressof(buffer), 4096, [1, 2]) == len(data)
    assert out.raw == data


def test_without_cuda_or_a_compiler_it_is_said_once(tmp_path, monkeypatch, caplog):
    def warned() -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="tpx"):
            assert native.library.__wrapped__() is None
        [record] = caplog.records
        return record.getMessage()

    begin = "no C++ to load with, weights take up to twice as long to load: "
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    assert warned().startswith(f"{begin}libcudart.so.0: cannot open shared object file")
    monkeypatch.setattr(native, "cuda_runtime", lambda: None)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert warned() == f"{begin}none of `c++`, `g++`, `clang++` is installed"
