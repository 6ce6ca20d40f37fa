"""find_model and read_config: a folder, the Hub's cache, and every way to have neither."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from headers import write_folder

from tpx.config import WHAT_IT_IS, read_config, read_generation_config
from tpx.errors import CheckpointError
from tpx.hub import NEEDED_FILES, find_model


def refusal(call, *args) -> tuple[str, str | None]:
    with pytest.raises(CheckpointError) as error:
        call(*args)
    assert error.value.exit_code == 3
    return error.value.message, error.value.hint


def test_a_folder_is_itself(tmp_path):
    assert find_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("given", ["/no/such/folder", "./gone", "a/b/c", "~/no/such"])
def test_a_folder_that_does_not_exist_is_named(given):
    assert refusal(find_model, given) == (
        f"folder `{given}` does not exist",
        "give the folder that holds `config.json`",
    )


def test_a_file_is_not_a_folder(tmp_path):
    path = write_folder(tmp_path) / "config.json"
    assert refusal(find_model, str(path)) == (
        f"`{path}` is a file",
        f"give its folder: `{tmp_path}`",
    )


def test_a_word_is_neither_a_folder_nor_a_hub_id():
    assert refusal(find_model, "gpt2000") == (
        "`gpt2000` is neither a folder nor a Hub id",
        "give a folder, or a Hub id of the form `owner/name`",
    )


def in_process(tmp_path, hub_id: str, **environ: str) -> str:
    """What find_model says of a hub id; huggingface_hub reads its environment when imported."""
    code = (
        "import sys\nfrom tpx.hub import find_model\nfrom tpx.errors import CheckpointError\n"
        "try: print(find_model(sys.argv[1]))\n"
        "except CheckpointError as error: print(error.render())\n"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, hub_id],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HOME": str(tmp_path), "PATH": "/usr/bin", **environ},
    )
    return found.stdout.strip()


def test_a_hub_id_absent_from_the_cache_while_offline(tmp_path):
    assert in_process(tmp_path, "owner/name", HF_HUB_OFFLINE="1") == (
        "error: `owner/name` is not in the Hub's cache, and HF_HUB_OFFLINE forbids to fetch it\n\n"
        "hint: unset HF_HUB_OFFLINE, or give a folder: `owner/name` is none here"
    )


def test_a_hub_that_does_not_answer(tmp_path):
    assert in_process(tmp_path, "owner/name", HF_ENDPOINT="http://127.0.0.1:9") == (
        "error: `owner/name` is not in the Hub's cache and cannot be fetched (ConnectError)\n\n"
        "hint: check the network, or give a folder: `owner/name` is none here"
    )


def test_a_cached_hub_id_is_found_while_offline(tmp_path):
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = write_folder(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert in_process(tmp_path, "owner/name", HF_HUB_OFFLINE="1") == str(snapshot)


def test_only_what_tpx_reads_is_fetched():
    from fnmatch import fnmatch

    def fetched(name):
        return any(fnmatch(name, pattern) for pattern in NEEDED_FILES)

    wanted = ["config.json", "model-00000-of-00002.safetensors", "tokenizer_config.json"]
    wanted += ["model.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    assert all(map(fetched, wanted))
    others = ["original/model.safetensors", "metal/model.bin", "pytorch_model.bin", "README.md"]
    assert not any(map(fetched, others))


def test_a_folder_without_config_says_what_a_checkpoint_is(tmp_path):
    message = f"folder `{tmp_path}` has no `config.json`"
    assert refusal(read_config, tmp_path) == (message, WHAT_IT_IS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: line 1: Expecting property name enclosed in double quotes"),
        (b"", "is not JSON: line 1: Expecting value"),
        (b"\xff", "is not JSON: byte 0 is not UTF-8"),
        (b"[]", "holds no JSON object"),
        (b"[" * 200_000, "is nested too deep to be a config"),
    ],
)
def test_a_config_that_is_no_json_object(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert refusal(read_config, tmp_path)[0] == f"`{path}` {message}"


def test_generation_config_may_be_absent(tmp_path):
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 2]}
