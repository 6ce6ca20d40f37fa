"""CheckpointIndex: the index file, its shards, and what lies there in place of them."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from headers import INDEX, SINGLE, header_of, write_folder, write_header

from tpx.errors import CheckpointError
from tpx.index import CheckpointIndex
from tpx.strict_json import MOST, MOST_BYTES, shown


def refusal(folder) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        CheckpointIndex.open(folder)
    assert error.value.exit_code == 3
    assert error.value.hint
    return error.value


def rewrite_index(folder, change) -> None:
    found = json.loads((folder / INDEX).read_text())
    change(found["weight_map"])
    (folder / INDEX).write_text(json.dumps(found))


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path, shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert refusal(tmp_path).message == (
        f"`model-00001-of-00002.safetensors` is missing from folder `{tmp_path}`"
    )


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.safetensors",
        "a/../../x",
        "a\\b",
        "C:x",
        "x\0y",
        "",
        "..",
        "\ud800",
        "n" * 1001,
    ],
)
def test_a_shard_outside_the_folder_is_refused_by_its_text(tmp_path, name):
    write_folder(tmp_path, shards=2)
    rewrite_index(tmp_path, lambda m: m.update({"model.norm.weight": name}))
    assert refusal(tmp_path).message == (
        f"`{INDEX}` names shard `{shown(name)}`, which is outside the folder"
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


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


LINKS = {
    "endless": "/dev/zero",
    "itself": SINGLE,
    "nowhere": "../../blobs/gone",
    "no disk": "/proc/self/mem",  # a regular file whose first byte cannot be read
}
ODD_FILES = {
    "pipe": (make_pipe, "is a pipe, not a file"),
    "socket": (make_socket, "is a socket, not a file"),
    "folder": (os.mkdir, "is a directory, not a file"),
    "endless": (None, "is a device, not a file"),
    "itself": (None, "cannot be read: Too many levels of symbolic links"),
    "nowhere": (None, "is a link to `../../blobs/gone`, which is missing"),
    "no disk": (None, "cannot be read at byte `0`: Input/output error"),
}


@pytest.mark.parametrize("name", [SINGLE, INDEX])
@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, kind, name):
    make, message = ODD_FILES[kind]
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    if make is not None:
        make(name)
    else:
        os.symlink(LINKS[kind].replace(SINGLE, name), name)
    assert refusal(tmp_path).message == f"`{name}` {message}"


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / SINGLE)
    whole = os.stat(__file__)
    monkeypatch.setattr("tpx.files.os.stat", lambda _: whole)
    assert refusal(tmp_path).message == f"`{SINGLE}` is a pipe, not a file"


@contextmanager
def nobody():
    """As a user who may read what all may, and nothing else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("locked", "name"), [(SINGLE, SINGLE), (".", "{folder}")])
def test_what_may_not_be_read_is_refused(locked, name):
    with TemporaryDirectory() as above:  # tmp_path lies in a folder of this user alone
        folder = write_folder(Path(above) / "model")
        for path in (Path(above), folder):
            path.chmod(0o755)
        (folder / locked).chmod(0)
        with nobody():
            error = refusal(folder)
        (folder / locked).chmod(0o755)
    assert error.message == f"`{name.format(folder=folder)}` cannot be read: Permission denied"
    assert error.hint == "check its permissions, and the disk that holds it"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    folder = tmp_path / "missing"
    assert refusal(folder).message == f"`{folder}` cannot be read: No such file or directory"


@pytest.mark.parametrize("byte", MOST)
def test_more_json_than_any_checkpoint_needs_is_not_parsed(tmp_path, byte):
    text = b'{"a": "' + byte * (MOST[byte] + 1) + b'"}'
    seen = text.count(byte)
    write_header(tmp_path / SINGLE, text, 0)
    assert refusal(tmp_path).message == (
        f"`{SINGLE}` is damaged: the JSON has {seen} times `{byte.decode()}`, and may have "
        f"{MOST[byte]}"
    )


def test_a_key_is_found_twice_among_many_in_a_moment(tmp_path):
    names = ", ".join(f'"{number}": 1' for number in range(50_000))
    write_header(tmp_path / SINGLE, f'{{{names}, "0": 1}}'.encode(), 0)
    begin = time.process_time()
    assert refusal(tmp_path).message == f"`{SINGLE}` is damaged: key `0` appears twice"
    assert time.process_time() - begin < 1


def test_an_index_file_of_any_size_is_read_in_part_alone(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(MOST_BYTES + 5)
    assert refusal(tmp_path).message == (
        f"`{INDEX}` is damaged: it has more than {MOST_BYTES} bytes"
    )


def test_a_shard_that_the_index_file_does_not_name_is_left_alone(tmp_path):
    write_folder(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"of another download")
    assert len(CheckpointIndex.open(tmp_path).files) == 2


def test_too_many_tensors_are_refused_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr("tpx.index.MOST_TENSORS", 3)
    write_folder(tmp_path, shards=2)
    shard, fourth = "model-00000-of-00002.safetensors", "model.layers.0.self_attn.v_proj.weight"
    assert refusal(tmp_path).message == f"`{shard}` holds tensor `{fourth}`, one more than 3"
