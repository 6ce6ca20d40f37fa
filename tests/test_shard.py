"""`tpx shard`: every byte of the checkpoint is in the ranks' files, where their shards say."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment
from make_checkpoint import make_checkpoint
from ranks import ranks
from safetensors.torch import load_file
from tiny import PROMPTS, open_llm, tiny_checkpoint, tiny_config

from tpx import SamplingParams, new_folder, shard as module
from tpx.cli.main import main
from tpx.errors import CheckpointError, PlanError
from tpx.plan.find import read_plan, shipped_plans
from tpx.plan.manifest import file_name, read_manifest
from tpx.plan.prepare import Prepared, prepare
from tpx.plan.rank_files import backwards, rank_files
from tpx.plan.spans import spans
from tpx.read import Arena, Files, ReadStats, load_spans
from tpx.shard import shard

SOON = ["tp4-etp4", "dp2-tp2-ep2-etp2"]
PLANS = [
    pytest.param(plan, marks=() if plan in SOON else pytest.mark.more)
    for plan in shipped_plans("gpt_oss")
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mxfp4", "bf16", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vocab_size=131, tie_word_embeddings=request.param == "tied")
    experts = "bf16" if request.param == "bf16" else "mxfp4"
    folder = tmp_path_factory.mktemp("shard") / request.param
    return make_checkpoint(folder, config, seed=3, shards=2, experts=experts)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("shard") / "small")


def world_of(plan: str) -> int:
    return read_plan(plan, "gpt_oss").mesh.world


def loaded(prepared: Prepared, rank: int) -> tuple[dict[str, torch.Tensor], ReadStats]:
    """What a rank holds once it has read its files."""
    plan, stats = prepared.rank_plan(rank), ReadStats()
    arena = Arena(plan, torch.bfloat16, CPU)
    with Files(prepared.folder, prepared.index.files) as files:
        load_spans(spans(plan), files, arena, stats)
    return {name: arena.view(name).clone() for name in arena.slots}, stats


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_equal(original: Prepared, out: Path) -> None:
    """Bit-equal shards in one stretch, as our reader and as the safetensors package reads them."""
    prepared = prepare(out, "auto", original.world)
    for rank in range(original.world):
        expected, _ = loaded(original, rank)
        found, stats = loaded(prepared, rank)
        stored = load_file(out / file_name(rank, original.world))
        assert expected.keys() == found.keys() == stored.keys()
        for name, tensor in expected.items():
            assert same_bits(found[name], tensor), (name, rank)
            assert same_bits(stored[name], tensor), (name, rank)
        [span] = spans(prepared.rank_plan(rank))
        assert stats.bytes_read == span.nbytes == sum(t.nbytes for t in stored.values())


def gathered(original: Prepared, out: Path) -> dict[str, bytearray]:
    """The checkpoint's files from the ranks' files alone: their data, zero where no rank has it."""
    files = {name: bytearray(found.size) for name, found in original.index.files.items()}
    for file in rank_files(original):
        data, at = (out / file.name).read_bytes(), len(file.head)
        for held in file.shards.values():
            span = backwards(held)
            for copy in span.copies:
                for row in range(copy.rows):
                    begin, to = at + copy.source + row * copy.source_step, copy.target
                    to += row * copy.target_step
                    files[copy.parameter][to : to + copy.nbytes] = data[begin : begin + copy.nbytes]
            at += span.nbytes
    return files


def check_gather(original: Prepared, out: Path) -> None:
    heads = {name: min(meta.offset for meta in original.index.tensors.values() if meta.file == name)
             for name in original.index.files}  # fmt: skip
    for name, data in gathered(original, out).items():
        assert data[heads[name] :] == (original.folder / name).read_bytes()[heads[name] :], name


@pytest.mark.parametrize("plan", PLANS)
def test_the_files_hold_every_byte_where_the_shards_have_it(checkpoint, plan, tmp_path):
    original = prepare(checkpoint, plan, world_of(plan))
    written = shard(original, tmp_path / "out")
    check_equal(original, tmp_path / "out")
    check_gather(original, tmp_path / "out")
    manifest, _ = read_manifest(tmp_path / "out")
    assert manifest.source == original.index.header_digest
    assert written[:2] == (original.world, sum(file.nbytes for file in manifest.files.values()))
    for name, stored in manifest.files.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == stored[:2]
    assert module.damaged(tmp_path / "out") == []


@pytest.mark.parametrize(("window", "gap", "threads"), [(4096, 0, 1), (4096, 1 << 16, 3)])
def test_shards_larger_than_a_window_are_made_piece_by_piece(
    small, tmp_path, monkeypatch, window, gap, threads
):
    shard(prepare(small, "tp4-etp4", 4), tmp_path / "one")
    monkeypatch.setattr(module, "WINDOW", window)
    monkeypatch.setattr(module, "GAP", gap)
    monkeypatch.setattr(module, "THREADS", threads)
    shard(prepare(small, "tp4-etp4", 4), tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_what_lies_beside_the_weights_comes_along(small, tmp_path):
    (small / "notes.txt").write_text("mine")
    shard(prepare(small, "tp2", 2), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", file_name(0, 2), file_name(1, 2),
        "tokenizer.json", "tpx.json",
    ]  # fmt: skip
    assert os.listdir(tmp_path) == ["out"]


def answers(folder: Path, plan: str) -> list[list[int]]:
    with open_llm(folder, plan) as llm:
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=8))
    return [completion.token_ids for completion in found]


def test_ranks_write_the_same_text_from_it(small, tmp_path):
    shard(prepare(small, "tp2-etp2", 2), tmp_path / "out")
    expected = ranks(2).run(answers, small, "tp2-etp2")
    assert ranks(2).run(answers, tmp_path / "out", "auto") == expected


def refused(*words: object) -> PlanError | CheckpointError:
    with pytest.raises((PlanError, CheckpointError)) as caught:
        shard(*words)
    return caught.value


def test_a_folder_that_is_there_is_not_touched(small, tmp_path):
    original, out = prepare(small, "tp2", 2), tmp_path / "out"
    out.mkdir()
    error = refused(original, out)
    assert isinstance(error, PlanError)
    assert error.message == f"`{out}` exists already"
    assert error.hint == "give another folder, or replace it: `--force`"
    shard(original, out, True)
    shard(prepare(small, "tp4-ep4", 4), out, True)
    assert read_manifest(out)[0].world == 4
    assert not (out / file_name(0, 2)).exists()
    (out / "mine.txt").touch()
    error = refused(original, out, True)
    assert isinstance(error, PlanError)
    assert error.message == (f"`{out}` was not written by `tpx shard` alone: it has `mine.txt`")
    assert error.hint == "give another folder, or remove this one yourself"
    assert refused(original, small, True).message.startswith(f"`{small}` was not written by")
    link = tmp_path / "link"
    link.symlink_to(out)
    assert refused(original, link, True).message.endswith("alone: it has `link`")
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_what_appears_meanwhile_stays(small, tmp_path):
    original, out = prepare(small, "tp2", 2), tmp_path / "out"

    def appear(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").touch()

    with pytest.raises(CheckpointError) as caught:
        shard(original, out, False, appear)
    assert caught.value.message == f"`{out}` cannot be written: Directory not empty"
    assert os.listdir(out) == ["theirs"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_without_room_is_an_error_before_anything_is_written(small, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(9, 1, 1000)
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: usage)
    original = prepare(small, "tp2", 2)
    needed = sum(file.nbytes for file in rank_files(original))
    error = refused(original, tmp_path / "new" / "out")
    assert isinstance(error, CheckpointError)
    assert error.message == (
        f"`{tmp_path}/new/out` needs {needed:,} bytes, and `{tmp_path}` has 1,000 free"
    )
    assert error.hint == "make room, or give a folder on another disk"
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_leaves_nothing(small, tmp_path):
    original = prepare(small, "tp2", 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        error = refused(original, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error, CheckpointError)
    assert error.message == f"`{tmp_path}/out` cannot be written: File too large"
    assert error.hint == "check its permissions, and its disk"
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_changes_meanwhile_leaves_nothing(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "small")
    original = prepare(folder, "tp2", 2)
    file = next(folder.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    error = refused(original, tmp_path / "out")
    assert isinstance(error, CheckpointError)
    assert error.message.startswith(f"`{file.name}` changed after its header was checked: ")
    assert os.listdir(tmp_path) == ["small"]


def test_an_interrupt_leaves_nothing(small, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard(prepare(small, "tp2", 2), tmp_path / "out", False, interrupt)
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tpx.plan.prepare import prepare
from tpx.shard import shard

def kill(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

shard(prepare(sys.argv[1], "tp2", 2), Path(sys.argv[2]), False, kill)
"""


@pytest.mark.more
def test_a_run_that_is_killed_leaves_nothing_that_looks_whole(small, tmp_path, capsys):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(small), str(out)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [partial] = new_folder.leftovers(out)
    assert os.listdir(tmp_path) == [partial.name]
    with pytest.raises(CheckpointError, match="has neither"):
        prepare(partial, "tp2", 2)
    assert main(["shard", "--tp-plan", "tp2", "--model", str(small), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(
        f"\nnote: `{partial}` is left from a run that was killed; remove it\n"
    )
    assert module.damaged(out) == []
