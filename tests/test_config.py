"""config.json, where something else lies in its place."""

from __future__ import annotations

import os

import pytest
from headers import INDEX

from tpx.config import MOST_BYTES, WHAT_IT_IS, read_config, read_generation_config
from tpx.errors import CheckpointError


def refusal(call, folder) -> tuple[str, str | None]:
    with pytest.raises(CheckpointError) as error:
        call(folder)
    return error.value.message, error.value.hint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a pipe, not a file"),
        (os.mkdir, "is a directory, not a file"),
        (lambda path: os.symlink("/dev/zero", path), "is a device, not a file"),
        (lambda path: os.symlink(path, path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: os.symlink("gone", path), "is a link to `gone`, which is missing"),
        (
            lambda path: os.symlink("/proc/self/mem", path),
            "cannot be read at byte `0`: Input/output error",
        ),
        (lambda path: path.write_text("9" * 5000), "is not JSON: Exceeds the limit"),
        (lambda path: path.write_text(" " * (MOST_BYTES + 1)), f"has more than {MOST_BYTES} bytes"),
    ],
)
@pytest.mark.parametrize(
    ("call", "name"),
    [(read_config, "config.json"), (read_generation_config, "generation_config.json")],
)
def test_what_is_no_config_is_refused_at_once(tmp_path, make, message, call, name):
    make(tmp_path / name)
    found, hint = refusal(call, tmp_path)
    assert found.startswith(f"`{tmp_path / name}` {message}")
    assert hint


def test_a_folder_without_one_says_what_it_should_be(tmp_path):
    (tmp_path / INDEX).touch()
    message = f"folder `{tmp_path}` has no `config.json`"
    assert refusal(read_config, tmp_path) == (message, WHAT_IT_IS)
    assert read_generation_config(tmp_path) == {}
