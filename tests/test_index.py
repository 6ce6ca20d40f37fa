"""CheckpointIndex: a corpus of damaged files, each refused with its name and what is wrong."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
from headers import SINGLE, make_config, write_folder, write_header

from tpx.errors import CheckpointError
from tpx.index import (
    DTYPE_BITS,
    MOST_HEADER_BYTES,
    MOST_NAME,
    CheckpointIndex,
    FileId,
    TensorMeta,
    header_nbytes,
    parse_header,
)

A = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}


def refusal(folder) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        CheckpointIndex.open(folder)
    assert error.value.exit_code == 3
    assert error.value.hint
    return error.value


def test_a_whole_folder_gives_every_tensor_with_its_place(tmp_path):
    index = CheckpointIndex.open(write_folder(tmp_path, shards=3))
    assert len(index.files) == 3
    for name, meta in index.tensors.items():
        assert meta.name == name
        assert meta.offset + meta.nbytes <= index.files[meta.file].size
    sinks = index.tensors["model.layers.1.self_attn.sinks"]
    assert (sinks.dtype, sinks.shape, sinks.nbytes) == ("BF16", (8,), 16)


def test_a_single_file_needs_no_index_file(tmp_path):
    write_header(tmp_path / SINGLE, {"a": A, "b": B}, 16)
    index = CheckpointIndex.open(tmp_path)
    found = (tmp_path / SINGLE).stat()
    size = found.st_size
    assert index.tensors["b"] == TensorMeta("b", SINGLE, "U8", (4,), size - 4, 4)
    assert index.files == {SINGLE: FileId(size, found.st_mtime_ns, found.st_ino)}


def test_the_digest_changes_with_any_header(tmp_path):
    first = CheckpointIndex.open(write_folder(tmp_path / "a", shards=2)).header_digest
    same = CheckpointIndex.open(write_folder(tmp_path / "b", shards=2)).header_digest
    other = write_folder(tmp_path / "c", make_config(vocab_size=132), shards=2)
    assert first == same != CheckpointIndex.open(other).header_digest


def test_zero_size_tensors_and_scalars_are_welcome(tmp_path):
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    write_header(tmp_path / SINGLE, {"scalar": scalar, "empty": empty})
    assert CheckpointIndex.open(tmp_path).tensors["empty"].nbytes == 0


def one(**changes) -> dict:
    return {"a": A | changes}


def raw(text: str) -> bytes:
    return text.encode()


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


A_JSON = json.dumps(A)
# header, bytes of data, what the message says after "`model.safetensors` "
DAMAGED = {
    "JSON cut": (raw('{"a": '), 0, "is damaged: the JSON does not parse: Expecting value"),
    "no object": (raw("[]"), 0, "is damaged: the header does not start with `{`"),
    "leading space": (raw(" {}"), 0, "is damaged: the header does not start with `{`"),
    "not UTF-8": (b'{"\xff": 1}', 0, "is damaged: byte 2 of the JSON is not UTF-8"),
    "deep": (raw('{"a":' + "[" * 200_000), 0, "is damaged: the JSON is nested too deep"),
    "twice": (raw(f'{{"a": {A_JSON}, "a": {A_JSON}}}'), 12, "is damaged: key `a` appears twice"),
    "metadata": ({"__metadata__": {"x": 1}}, 0, "is damaged: `__metadata__` is no object of str"),
    "NaN": (raw('{"a": NaN}'), 0, "is damaged: `NaN` where only whole numbers belong"),
    "fraction": (one(shape=[2, 3.0]), 12, "is damaged: `3.0` where only whole numbers belong"),
    "true": (one(shape=[True, 6]), 12, "is damaged: tensor `a` has shape `[True, 6]`"),
    "negative": (one(shape=[-2, -3]), 12, "is damaged: tensor `a` has shape `[-2, -3]`"),
    "many dimensions": (one(shape=[1] * 33), 12, "is damaged: tensor `a` has shape `[1, 1,"),
    "huge": (
        one(shape=[2**33, 2**33]),
        12,
        "is damaged: tensor `a` has shape `[8589934592, 8589934592]`",
    ),
    "huger": (
        one(shape=[2**62] * 32),
        12,
        "is damaged: tensor `a` has shape `[4611686018427387904,",
    ),
    "huge beside nothing": (
        one(shape=[2**33, 2**33, 0], data_offsets=[0, 0]),
        0,
        "is damaged: tensor `a` has shape `[8589934592, 8589934592, 0]`",
    ),
    "past what a file can hold": (
        one(data_offsets=[0, 2**63]),
        12,
        "is damaged: tensor `a` has data_offsets `[0, 9223372036854775808]`",
    ),
    "negative offset": (one(data_offsets=[-12, 0]), 12, "is damaged: tensor `a` has data_offsets"),
    "true as an offset": (
        one(data_offsets=[False, 12]),
        12,
        "is damaged: tensor `a` has data_offsets `[False, 12]`",
    ),
    "fraction of an offset": (
        one(data_offsets=[0.0, 12]),
        12,
        "is damaged: `0.0` where only whole numbers belong",
    ),
    "exponent": (raw('{"a": 1e999}'), 0, "is damaged: `1e999` where only whole numbers belong"),
    "offset as text": (one(data_offsets=["0", "12"]), 12, "is damaged: tensor `a` has data_offs"),
    "deep shape": (
        raw('{"a": {"dtype": "U8", "data_offsets": [0, 0], "shape": ' + deep(800) + "}}"),
        0,
        "is damaged: tensor `a` has shape `[[[[...]]]]`",
    ),
    "dtype that is no text": (one(dtype=["U8"]), 12, "stores tensor `a` in dtype `['U8']`, which"),
    "long dtype": (one(dtype="U" * 10_000), 12, "stores tensor `a` in dtype `UUUU"),
    "dtype NaN": (one(dtype="NaN"), 12, "stores tensor `a` in dtype `NaN`, which is unknown"),
    "long name": (
        {"n" * (MOST_NAME + 1): A},
        12,
        "is damaged: a tensor has the name `nnnnnn",
    ),
    "name that clears a screen": (
        {"\x1b[2J": A},
        12,
        "is damaged: a tensor has the name `\\x1b[2J`",
    ),
    "half a character": (
        raw(f'{{"\\ud800": {A_JSON}}}'),
        12,
        "is damaged: a tensor has the name `\\ud800`",
    ),
    "metadata twice": (
        raw('{"__metadata__": {"a": "1"}, "__metadata__": {"b": "2"}}'),
        0,
        "is damaged: key `__metadata__` appears twice",
    ),
    "same field twice": (
        raw('{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'),
        0,
        "is damaged: key `dtype` appears twice",
    ),
    "metadata that is no object": (
        {"__metadata__": None},
        0,
        "is damaged: `__metadata__` is no object of strings",
    ),
    "long number": (
        raw('{"a": {"shape": [' + "9" * 5000 + "]}}"),
        0,
        "is damaged: the JSON does not parse: Exceeds the limit",
    ),
    "missing field": ({"a": {"dtype": "U8"}}, 0, "is damaged: tensor `a` needs dtype, shape and"),
    "extra field": (one(stride=1), 12, "is damaged: tensor `a` needs dtype, shape and"),
    "reversed": (
        one(data_offsets=[12, 0]),
        12,
        "is damaged: tensor `a` has data_offsets `[12, 0]`",
    ),
    "three offsets": (one(data_offsets=[0, 4, 12]), 12, "is damaged: tensor `a` has data_offsets"),
    "wrong size": (
        one(shape=[2, 4]),
        12,
        "is damaged: tensor `a`, BF16 [2, 4], has 12 bytes for 16",
    ),
    "half a byte": (
        one(dtype="F4", shape=[3], data_offsets=[0, 1]),
        1,
        "is damaged: tensor `a`, F4 [3], has 1 bytes for 12 bits",
    ),
    "dtype": (one(dtype="BF17"), 12, "stores tensor `a` in dtype `BF17`, which is unknown"),
    "overlap": (
        {"a": A, "b": B | {"data_offsets": [8, 12]}},
        12,
        "is damaged: tensor `b` overlaps `a`: it begins at byte `143`, not at `147`",
    ),
    "same bytes": (
        {"a": A, "b": A},
        12,
        "is damaged: tensor `b` overlaps `a`",
    ),
    "hole": (
        {"a": A, "b": B | {"data_offsets": [20, 24]}},
        24,
        "is damaged: tensor `b` leaves a hole after `a`: it begins at byte `156`, not at `148`",
    ),
    "first hole": ({"b": B}, 16, "is damaged: tensor `b` leaves a hole after `the header`"),
    "out of bounds": ({"a": A, "b": B}, 12, "is cut short: it has "),
    "trailing": ({"a": A}, 13, "has 1 bytes more than its header describes ("),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path, case):
    header, data, wanted = DAMAGED[case]
    write_header(tmp_path / SINGLE, header, data)
    message = refusal(tmp_path).message
    assert message.startswith(f"`{SINGLE}` {wanted}")
    assert len(message) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"`{SINGLE}` is damaged: a header of 0 bytes in a file of 0"),
        (b"1234567", f"`{SINGLE}` is damaged: a header of 0 bytes in a file of 7"),
        (b"\0" * 16, f"`{SINGLE}` is damaged: a header of 0 bytes in a file of 16"),
        (
            struct.pack("<Q", 2**63 + 5) + b"{}",
            f"`{SINGLE}` is damaged: a header of {2**63 + 5} bytes in a file of 10",
        ),
        (
            struct.pack("<Q", MOST_HEADER_BYTES + 1) + b"{}",
            f"`{SINGLE}` is damaged: a header of {MOST_HEADER_BYTES + 1} bytes in a file of 10",
        ),
        (
            struct.pack("<Q", 100) + b"{}",
            f"`{SINGLE}` is cut short: it has 10 bytes, its header alone needs 108",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            f"`{SINGLE}` is a pointer of Git LFS, not a safetensors file",
        ),
    ],
)
def test_a_length_that_cannot_be_is_refused(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    assert refusal(tmp_path).message == message


def test_a_truncated_shard_is_refused_with_both_sizes(tmp_path):
    write_folder(tmp_path, shards=2)
    path = tmp_path / "model-00001-of-00002.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    error = refusal(tmp_path)
    last = "model.norm.weight"
    assert error.message == (
        f"`{path.name}` is cut short: it has {size - 1} bytes, its header promises {size}, and "
        f"tensor `{last}` is the first that is not whole"
    )
    assert error.hint == "download the checkpoint again, whole"


def test_no_name_of_a_tensor_becomes_a_path(tmp_path):
    write_header(tmp_path / SINGLE, {"../../etc/x": A}, 12)
    assert CheckpointIndex.open(tmp_path).tensors["../../etc/x"].file == SINGLE


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_each_dtype_of_the_format_is_known(tmp_path, dtype):
    """As safetensors' own package reads it."""
    nbytes = DTYPE_BITS[dtype]  # of 8 elements
    write_header(
        tmp_path / SINGLE, {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, nbytes]}}
    )
    assert CheckpointIndex.open(tmp_path).tensors["a"].nbytes == nbytes
    [(name, found)] = safetensors.deserialize((tmp_path / SINGLE).read_bytes())
    assert (name, found["dtype"], found["shape"]) == ("a", dtype, [8])


def test_a_header_is_read_from_the_bytes_before_the_data_alone(tmp_path):
    path = tmp_path / SINGLE
    write_header(path, {"a": A, "b": B})
    data, size = path.read_bytes(), path.stat().st_size
    needed = header_nbytes(data[:8], "f", size)
    assert needed == size - 16
    header = parse_header(data[:needed], "f", size)
    assert header == parse_header(data, "f", size)  # the data is not looked at
    assert [meta.offset for meta in header.tensors] == [needed, needed + 12]
    with pytest.raises(CheckpointError) as error:
        parse_header(data[: needed - 1], "f", size)
    assert error.value.message == (
        f"`f` is damaged: it ends at byte `{needed - 1}`, in its header of {needed - 8} bytes"
    )
