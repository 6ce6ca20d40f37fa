"""read/: a disk that fails, files that change, readers that are slow: one error, and no thread or
file is left."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
import torch
from make_checkpoint import make_checkpoint
from reading import error_of, load_rank, touch
from sending import load_as_on_gpu
from tiny import tiny_config

from tpx.plan.prepare import Prepared, prepare
from tpx.read import Limits, Source, load_spans

EIO = OSError(5, "Input/output error")
LIMITS = Limits(threads=4, most=4096, buffers=2)
Fault = Callable[[str, int], OSError | int | None]
Tensors = dict[str, torch.Tensor]
HINT = "start again when nothing writes to the checkpoint"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults") / "model", tiny_config())


@pytest.fixture
def prepared(original: Path, tmp_path: Path) -> Prepared:
    """On files of its own, to be damaged."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return prepare(str(tmp_path), "tp2-etp2", 2)


class Faulty:
    """A source that asks `fault` before each read: an OSError to raise, how many bytes to give at
    most, or None for all that is asked."""

    def __init__(self, source: Source, fault: Fault):
        self.source, self.fault = source, fault

    def preadv(self, file: str, buffers: Sequence[memoryview], offset: int) -> int:
        found = self.fault(file, offset)
        if isinstance(found, OSError):
            raise found
        if found is not None:
            buffers = [buffers[0][:found]]
        return self.source.preadv(file, buffers, offset)


class Load(Protocol):
    def __call__(self, prepared: Prepared, fault: Fault, limits: Limits = LIMITS) -> Tensors: ...


@pytest.fixture(params=[load_spans, load_as_on_gpu], ids=["host", "device"])
def load(request: pytest.FixtureRequest) -> Load:
    """Checks, also where it fails, that nothing is left over."""

    def checked(prepared: Prepared, fault: Fault, limits: Limits = LIMITS) -> Tensors:
        files = len(os.listdir("/proc/self/fd"))
        try:
            around = partial(Faulty, fault=fault)
            return load_rank(prepared, 1, None, limits, around=around, load=request.param)[0]
        finally:
            assert not [t for t in threading.enumerate() if t.name.startswith("tpx-read")]
            assert len(os.listdir("/proc/self/fd")) == files

    return checked


def same(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a | b)


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_short_reads_go_on(load, prepared, most):
    expected = load(prepared, lambda file, offset: None)
    limits = LIMITS._replace(most=1 << 20)
    assert same(load(prepared, lambda file, offset: max(most, offset % 4099), limits), expected)


FIRST = "model-00000-of-00001.safetensors"


def place(prepared: Prepared, name: str) -> tuple[str, int]:
    """The file of a tensor, and its first byte."""
    (part,) = prepared.rank_plan(1).shards[name].parts
    return part.meta.file, part.meta.offset


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.router.bias"])
def test_a_disk_error_names_the_file_the_byte_and_the_tensor(load, prepared, name):
    """The read that holds the tensor gives what comes before it; its first byte fails."""
    where, bad = place(prepared, name)

    def fault(file: str, offset: int) -> OSError | int | None:
        if file != where or not 0 <= bad - offset < 4096:
            return None
        return EIO if offset == bad else bad - offset

    error = error_of(lambda: load(prepared, fault))
    assert error.message == (
        f"`{where}` cannot be read at byte `{bad}`, in `{name}`: Input/output error"
    )
    assert error.hint == "check the disk that holds it"


def test_a_file_that_ends_early_names_the_byte_and_the_tensor(load, prepared):
    where, begin = place(prepared, "model.norm.weight")
    bad = begin + 10

    def fault(file: str, offset: int) -> int | None:
        return bad - offset if file == where and 0 <= bad - offset < 4096 else None

    error = error_of(lambda: load(prepared, fault))
    assert error.message == f"`{where}` ends at byte `{bad}`, inside `model.norm.weight`"
    assert error.hint == "the file was cut short after its header was checked; fetch it again"


def test_the_first_of_several_errors_is_raised(load, prepared):
    """Each read but the first fails, and the first one fails after another has."""
    failed, first = threading.Event(), list[int]()

    def fault(file: str, offset: int) -> OSError:
        first.append(offset)
        if offset == min(first) == first[0]:
            assert failed.wait(10)
        failed.set()
        return EIO

    error = error_of(lambda: load(prepared, fault))
    assert f"at byte `{min(first)}`" in error.message


def test_after_an_error_no_more_is_read(load, prepared):
    asked = list[int]()

    def fault(file: str, offset: int) -> OSError | None:
        asked.append(offset)
        return EIO if len(asked) == 3 else None

    error_of(lambda: load(prepared, fault, Limits(1, 4096, 1)))
    assert len(asked) == 3


@pytest.mark.parametrize("threads", [2, 4])
def test_a_slow_reader_holds_nobody_up(load, prepared, threads):
    """The first read waits until the others have read all else: through the one buffer it left."""
    expected = load(prepared, lambda file, offset: None)
    lock, others, calls = threading.Lock(), threading.Event(), [0]
    limits = Limits(threads, 4096, 2)
    total = count_reads(load, prepared, limits)

    def fault(file: str, offset: int) -> None:
        with lock:
            calls[0] += 1
            first = calls[0] == 1
            if calls[0] == total:
                others.set()
        if first:
            assert others.wait(10)

    assert same(load(prepared, fault, limits), expected)


def count_reads(load: Load, prepared: Prepared, limits: Limits) -> int:
    calls = list[int]()
    load(prepared, lambda file, offset: calls.append(offset), limits)
    return len(calls)


@pytest.mark.parametrize("how", [load_spans, load_as_on_gpu])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_load_leaves_no_thread(prepared, kind, how):
    """Readers that wait for a buffer are let go."""

    def stop(done: int) -> None:
        raise kind

    with pytest.raises(kind):
        load_rank(prepared, 0, limits=Limits(4, 4096, 1), progress=stop, load=how)
    assert not [t for t in threading.enumerate() if t.name.startswith("tpx-read")]


def test_a_bug_in_a_source_is_raised_as_it_is(load, prepared):
    def fault(file: str, offset: int) -> None:
        raise ZeroDivisionError(offset)

    with pytest.raises(ZeroDivisionError):
        load(prepared, fault)


class Change(NamedTuple):
    act: Callable[[Path], None]
    how: str


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    info = path.stat()
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    os.replace(other, path)


CHANGES = {
    "cut short": Change(cut_short, "it has `{less}` bytes and had `{size}`"),
    "replaced": Change(replace, "another file took its place"),
    "written": Change(touch, "it was written to"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changed_before_it_is_opened(load, prepared, change):
    size = (prepared.folder / FIRST).stat().st_size
    change.act(prepared.folder / FIRST)
    error = error_of(lambda: load(prepared, lambda file, offset: None))
    how = change.how.format(less=size - 100, size=size)
    assert error.message == f"`{FIRST}` changed after its header was checked: {how}"
    assert error.hint == HINT


def test_a_file_that_is_written_to_while_it_is_loaded(load, prepared):
    calls = list[str]()

    def fault(file: str, offset: int) -> None:
        calls.append(file)
        if calls.count(FIRST) == 3:
            touch(prepared.folder / FIRST)

    error = error_of(lambda: load(prepared, fault, Limits(1, 4096, 1)))
    assert error.message == f"`{FIRST}` changed while it was loaded: it was written to"
    assert error.hint == HINT


def test_a_file_that_is_replaced_while_it_is_loaded_is_read_to_its_end(load, prepared):
    """The one that was opened is still whole."""
    expected, replaced = load(prepared, lambda file, offset: None), list[str]()

    def fault(file: str, offset: int) -> None:
        if not replaced:
            replaced.append(file)
        elif len(replaced) == 1:
            replaced.append(file)
            (prepared.folder / "other").write_bytes(b"other")
            os.replace(prepared.folder / "other", prepared.folder / file)

    assert same(load(prepared, fault, Limits(1, 4096, 1)), expected)
    assert (prepared.folder / FIRST).read_bytes() == b"other"


def test_a_file_that_has_gone(load, prepared):
    (prepared.folder / FIRST).unlink()
    error = error_of(lambda: load(prepared, lambda file, offset: None))
    assert error.message == f"`{FIRST}` is missing from folder `{prepared.folder}`"
