"""CheckpointIndex: a corpus of damaged files, each refused with its name and what is wrong."""

from __future__ import annotations

import json
import struct

import pytest
from headers import INDEX, SINGLE, header_of, make_config, write_folder, write_header

from tpx.errors import CheckpointError
from tpx.index import MOST_HEADER_BYTES, CheckpointIndex, TensorMeta

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
        assert meta.offset + meta.nbytes <= index.files[meta.file]
    sinks = index.tensors["model.layers.1.self_attn.sinks"]
    assert (sinks.dtype, sinks.shape, sinks.nbytes) == ("BF16", (8,), 16)


def test_a_single_file_needs_no_index_file(tmp_path):
    write_header(tmp_path / SINGLE, {"a": A, "b": B}, 16)
    index = CheckpointIndex.open(tmp_path)
    size = (tmp_path / SINGLE).stat().st_size
    assert index.tensors["b"] == TensorMeta("b", SINGLE, "U8", (4,), size - 4, 4)
    assert index.files == {SINGLE: size}


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
        "is damaged: tensor `a`, BF16 [8589934592, 8589934592]",
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
        "is damaged: tensor `a`, F4 [3], has 1 bytes for 1.5",
    ),
    "dtype": (one(dtype="BF17"), 12, "stores tensor `a` in dtype `BF17`, which is unknown"),
    "overlap": (
        {"a": A, "b": B | {"data_offsets": [8, 12]}},
        12,
        "is damaged: tensor `b` overlaps `a`",
    ),
    "same bytes": (
        {"a": A, "b": A},
        12,
        "is damaged: tensor `b` overlaps `a`",
    ),
    "hole": (
        {"a": A, "b": B | {"data_offsets": [20, 24]}},
        24,
        "is damaged: tensor `b` leaves a hole after `a`",
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
    assert error.message == (
        f"`{path.name}` is cut short: it has {size - 1} bytes, its header promises {size}"
    )
    assert error.hint == "download the checkpoint again, whole"


def rewrite_index(folder, change) -> None:
    found = json.loads((folder / INDEX).read_text())
    change(found["weight_map"])
    (folder / INDEX).write_text(json.dumps(found))


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path, shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert refusal(tmp_path).message == (
        f"shard `model-00001-of-00002.safetensors` is missing from folder `{tmp_path}`, "
        f"and `{INDEX}` names it"
    )


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.safetensors", "a/../../x", "a\\b", "C:x", "x\0y", "", ".."]
)
def test_a_shard_outside_the_folder_is_refused_by_its_text(tmp_path, name):
    write_folder(tmp_path, shards=2)
    rewrite_index(tmp_path, lambda m: m.update({"model.norm.weight": name}))
    assert refusal(tmp_path).message == (
        f"`{INDEX}` names shard `{name}`, which is outside the folder"
    )


def test_the_hub_caches_symbolic_links_are_followed(tmp_path):
    blobs = write_folder(tmp_path / "blobs", shards=2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert CheckpointIndex.open(snapshot).tensors == CheckpointIndex.open(blobs).tensors


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_folder(tmp_path, shards=2)
    second = tmp_path / "model-00001-of-00002.safetensors"
    tensors = {"model.embed_tokens.weight": ("U8", (4,)), "extra": ("U8", (1,))}
    write_header(second, header_of(tensors))
    rewrite_index(tmp_path, lambda m: m.update(extra=second.name))
    assert refusal(tmp_path).message == (
        "tensor `model.embed_tokens.weight` is in two files, "
        "`model-00000-of-00002.safetensors` and `model-00001-of-00002.safetensors`"
    )


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path):
    write_folder(tmp_path, shards=2)
    rewrite_index(tmp_path, lambda m: m.update(ghost="model-00000-of-00002.safetensors"))
    assert refusal(tmp_path).message == (
        f"tensor `ghost` is not in `model-00000-of-00002.safetensors`, where `{INDEX}` puts it"
    )


def test_a_tensor_that_the_index_file_does_not_list_is_named(tmp_path):
    write_folder(tmp_path, shards=2)
    rewrite_index(tmp_path, lambda m: m.pop("model.norm.weight"))
    assert refusal(tmp_path).message.startswith("tensor `model.norm.weight` in `model-0000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", f"`{INDEX}` has no `weight_map` of tensor to file"),
        ("[]", f"`{INDEX}` has no `weight_map` of tensor to file"),
        ('{"weight_map": {}}', f"`{INDEX}` has no `weight_map` of tensor to file"),
        ('{"weight_map": {"a": 1}}', f"`{INDEX}` names no file for tensor `a`"),
        ('{"weight_map": {"a": "x", "a": "y"}}', f"`{INDEX}` is damaged: key `a` appears twice"),
    ],
)
def test_an_index_file_that_says_nothing_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    assert refusal(tmp_path).message == message


def test_an_index_file_may_hold_a_fraction_beside_its_map(tmp_path):
    write_folder(tmp_path, shards=2)
    found = json.loads((tmp_path / INDEX).read_text()) | {"metadata": {"total_size": 1.5}}
    (tmp_path / INDEX).write_text(json.dumps(found))
    assert CheckpointIndex.open(tmp_path).tensors


def test_a_folder_without_weights_says_what_to_convert(tmp_path):
    error = refusal(tmp_path)
    assert error.message == f"folder `{tmp_path}` has neither `{SINGLE}` nor `{INDEX}`"
    (tmp_path / "pytorch_model.bin").touch()
    assert refusal(tmp_path).hint == "convert `pytorch_model.bin` to safetensors first"


def test_no_name_of_a_tensor_becomes_a_path(tmp_path):
    write_header(tmp_path / SINGLE, {"../../etc/x": A}, 12)
    assert CheckpointIndex.open(tmp_path).tensors["../../etc/x"].file == SINGLE
