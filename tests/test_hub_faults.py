"""Downloads that fail, are killed or meet damage: nothing is lost, and no hole is ever loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hub_case import (
    COMMIT,
    bytes_asked,
    check_bytes,
    fetch,
    more,
    nbytes,
    random_files,
    refusal,
    shards,
)
from hub_server import HUB_ID, Request, connect, hub_server
from huggingface_hub import close_session, constants

import tpx.hub.store
from tpx import hub
from tpx.errors import CheckpointError
from tpx.plan.fetch import blocks_of
from tpx.plan.prepare import prepare


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return random_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def session():
    yield
    close_session()


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    with hub_server(dict(files)) as found:
        connect(found, tmp_path / "hub", monkeypatch.setattr)
        yield found


@pytest.mark.parametrize("fault", ["cut", *more("short", "429", "503", "403")])
def test_every_request_fails_once(server, files, fault):
    failed = set()

    def first(request: Request) -> str | None:
        key = request.name, request.stop
        return None if key in failed else failed.add(key) or fault

    prepared = prepare(HUB_ID, "ep4", 4)
    server.fault = first
    check_bytes(fetch(prepared, [0], "partial"), [0], files)
    assert failed


@pytest.mark.more
def test_what_came_before_an_error_is_kept(server, files):
    prepared = prepare(HUB_ID, "ep4", 4)
    last = sorted(shards(files))[-1]
    server.fault = lambda request: "whole" if request.name == last else None
    message, _ = refusal(lambda: fetch(prepared, range(4), "partial"))
    assert message == f"the Hub answers a range of `{last}` with the whole file (200, not 206)"
    server.fault = lambda request: None
    missing = hub.missing(prepared.folder, blocks_of([prepared.rank_plan(r) for r in range(4)]))
    server.take()
    check_bytes(fetch(prepared, range(4), "partial"), range(4), files)
    assert bytes_asked(server.take()) == nbytes(missing, files)


CHILD = """
import sys
from tpx.plan.fetch import fetched
from tpx.plan.prepare import prepare
with fetched(prepare(sys.argv[1], "ep4", 4), range(4), "partial"):
    pass
"""


def test_a_killed_process_leaves_what_it_had(server, files, tmp_path):
    """Also: HF_ENDPOINT and HF_HUB_CACHE are read as the Hub's client reads them."""
    hold, served = threading.Event(), threading.Semaphore(0)
    allowed = [2]

    def stall(request: Request) -> None:
        if request.stop - request.start <= 1 << 16:
            return  # a header
        served.release()
        allowed[0] -= 1
        if allowed[0] < 0:
            hold.wait()

    server.fault = stall
    environ = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", CHILD, HUB_ID]
    child = subprocess.Popen(command, env=environ, cwd=Path(__file__).parent.parent)
    folder = tmp_path / "hub" / "tpx--models--owner--name" / COMMIT
    try:
        for _ in range(3):
            assert served.acquire(timeout=60)
        while not (kept := listed(folder, files)):
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
        hold.set()
    server.fault = lambda request: None
    prepared = prepare(HUB_ID, "ep4", 4)
    server.take()
    check_bytes(fetch(prepared, range(4), "partial"), range(4), files)
    needed = blocks_of([prepared.rank_plan(rank) for rank in range(4)])
    assert bytes_asked(server.take()) <= nbytes(needed, files) - nbytes(kept, files)


def listed(folder: Path, files: dict[str, bytes]) -> hub.Needed:
    every = {name: frozenset(range(-(-len(data) // hub.BLOCK))) for name, data in files.items()}
    with suppress(CheckpointError):  # no record yet
        every = {name: every[name] for name in shards(files)}
        lacking = hub.missing(folder, every, sealed=False)
        found = {name: every[name] - lacking.get(name, frozenset()) for name in every}
        return {name: blocks for name, blocks in found.items() if blocks}
    return {}


def test_a_damaged_block_is_fetched_again_alone(server, files):
    prepared = fetch(prepare(HUB_ID, "ep4", 4), [1], "partial")
    name, blocks = next(iter(blocks_of([prepared.rank_plan(1)]).items()))
    block = sorted(blocks)[-1]
    with (prepared.folder / name).open("r+b") as file:
        file.seek(block * hub.BLOCK + 17)
        file.write(b"damaged")
    server.take()
    check_bytes(fetch(prepared, [1]), [1], files)
    assert bytes_asked(server.take()) == nbytes({name: frozenset([block])}, files)


@pytest.mark.parametrize(
    "tail", ["block 1 ", *more("seal 5\nblock 999999 " + "0" * 64 + "\n", "\0\0")]
)
def test_a_manifest_that_ends_oddly(server, files, tail):
    prepared = fetch(prepare(HUB_ID, "ep4", 4), [1], "partial")
    for name in shards(files):
        manifest = prepared.folder / ".tpx" / f"{name}.blocks"
        manifest.write_text(manifest.read_text() + tail)
    server.take()
    check_bytes(fetch(prepared, [1]), [1], files)
    assert server.take() == []  # every block's hash was right


@pytest.mark.more
@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"size": 1, "etag": "x"}\n', "\n"])
def test_a_manifest_that_says_nothing(server, files, text):
    prepared = fetch(prepare(HUB_ID, "ep4", 4), [1], "partial")
    name = next(iter(blocks_of([prepared.rank_plan(1)])))
    (prepared.folder / ".tpx" / f"{name}.blocks").write_text(text)
    server.take()
    check_bytes(fetch(prepared, [1]), [1], files)
    assert bytes_asked(server.take()) > 0


def test_a_damaged_record(server):
    folder = prepare(HUB_ID, "ep4", 4).folder
    (folder / ".tpx" / "hub.json").write_text("[")
    assert refusal(lambda: fetch(prepare(HUB_ID, "ep4", 4), [0])) == (
        f"`{folder}/.tpx/hub.json` cannot be read",
        f"remove the folder `{folder}`",
    )


def test_offline_without_the_blocks(server, monkeypatch, files):
    prepared = prepare(HUB_ID, "ep4", 4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    total = nbytes(blocks_of([prepared.rank_plan(0)]), files)
    assert refusal(lambda: fetch(prepared, [0], "partial")) == (
        f"{total:,} bytes that the plan needs of `owner/name` are not in the Hub's cache, and "
        "HF_HUB_OFFLINE forbids to fetch them",
        "unset HF_HUB_OFFLINE, or use the plan that they were fetched for",
    )


@pytest.mark.more
def test_a_disk_without_room(server, monkeypatch, files):
    prepared = prepare(HUB_ID, "ep4", 4)
    total = nbytes(blocks_of([prepared.rank_plan(0)]), files)

    class Usage:
        free = 12_345

    monkeypatch.setattr(tpx.hub.store.shutil, "disk_usage", lambda folder: Usage)
    assert refusal(lambda: fetch(prepared, [0], "partial")) == (
        f"{total:,} bytes of `owner/name` are to be fetched, and `{prepared.folder}` has room for "
        "12,345",
        "make room, or set HF_HUB_CACHE to a folder on another disk",
    )


@pytest.mark.more
def test_a_disk_that_fills_up(server, monkeypatch, files):
    prepared = prepare(HUB_ID, "ep4", 4)

    def full(*given: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tpx.hub.sparse.os.pwrite", full)
        assert refusal(lambda: fetch(prepared, [0], "partial")) == (
            f"the cache `{prepared.folder}` cannot be written: No space left on device",
            "make room or get the right to write, or set HF_HUB_CACHE to another folder",
        )
    check_bytes(fetch(prepared, [0], "partial"), [0], files)


@pytest.mark.more
def test_a_shard_that_is_not_on_the_hub(server, files):
    name = sorted(shards(files))[0]
    del server.commits[COMMIT][name]
    message, _ = refusal(lambda: prepare(HUB_ID, "ep4", 4))
    assert message.startswith(f"`{name}` is missing from folder `")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ((90_000).to_bytes(8, "little") + b"{" * 90_000, "is damaged: the JSON"),
        *more(
            (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
            ((1 << 62).to_bytes(8, "little") + b"{}", "is damaged: a header of"),
            (b"\2\0\0\0\0\0\0\0{}more", "4 bytes more than its header describes"),
        ),
    ],
)
def test_a_header_that_is_none_is_not_kept(server, files, data, says):
    name = sorted(shards(files))[0]
    server.commits[COMMIT][name] = data
    message, _ = refusal(lambda: prepare(HUB_ID, "ep4", 4))
    assert f"`{name}`" in message
    assert says in message
    server.commits[COMMIT] = files
    assert prepare(HUB_ID, "ep4", 4).folder.name == COMMIT


def test_names_that_lead_out_of_the_folder(server, tmp_path):
    inside = dict(server.commits[COMMIT])
    odd = [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "a/../../config.json",
        "..\\config.json",
    ]
    server.commits[COMMIT] |= dict.fromkeys([*odd, "README.md"], b"{}")
    folder = prepare(HUB_ID, "ep4", 4).folder
    assert {path.name for path in folder.iterdir()} == {*inside, ".tpx", ".cache"}
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.more
def test_an_index_file_that_is_none(server):
    server.commits[COMMIT]["model.safetensors.index.json"] = json.dumps({"a": 1}).encode()
    message, _ = refusal(lambda: prepare(HUB_ID, "ep4", 4))
    assert message == "`model.safetensors.index.json` has no `weight_map` of tensor to file"
