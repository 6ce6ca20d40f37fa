"""`tpx shard` on the command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from tpx.cli.main import main
from tpx.plan.manifest import file_name
from tpx.plan.prepare import prepare
from tpx.shard import shard


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("shard"))


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["shard", *map(str, words)])
    return code, *capsys.readouterr()


def test_the_command_says_what_it_wrote_and_verifies_it(capsys, small, tmp_path):
    out = tmp_path / "out"
    code, said, error = run(capsys, "--tp-plan", "tp2", "--model", small, "--out", out)
    assert (code, error) == (0, "")
    total = sum(file.stat().st_size for file in out.glob("rank-*"))
    assert said.startswith(f"wrote 2 files, {total / 1e3:.2f} kB, to `{out}` in ")
    code, said, error = run(capsys, "--verify", out)
    assert (code, error) == (0, "")
    assert said == f"2 files, {total / 1e3:.2f} kB: every byte is as it was written\n"
    data = bytearray((out / file_name(1, 2)).read_bytes())
    data[-1] ^= 1
    (out / file_name(1, 2)).write_bytes(data)
    code, said, error = run(capsys, "--verify", out)
    assert (code, error) == (1, "")
    assert said == f"`{file_name(1, 2)}` is not as it was written: its sha256 is another\n"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--tp-plan", "tp2", "--model", "{small}"], 2,
         "error: `tpx shard` needs `--out`\n\nhint: add `--out DIR`\n"),
        (["--model", "{small}", "--out", "{out}"], 2,
         "error: `tpx shard` needs `--tp-plan`\n\nhint: add `--tp-plan PLAN`\n"),
        (["--tp-plan", "auto", "--model", "{small}", "--out", "{out}"], 2,
         "error: `auto` plans for a number of ranks, and none is given\n\n"
         "hint: add `--world 2`\n"),
        (["--tp-plan", "tp2", "--model", "{small}", "--out", "{small}"], 2,
         "error: `{small}` exists already\n\n"
         "hint: give another folder, or replace it: `--force`\n"),
        (["--verify", "{small}"], 3,
         "error: there is no `{small}/tpx.json`\n\nhint: give what `tpx shard` wrote\n"),
    ],
)  # fmt: skip
def test_usage_mistakes(capsys, small, tmp_path, words, code, text):
    places = {"small": small, "out": tmp_path / "out"}
    found = run(capsys, *(word.format(**places) for word in words))
    assert found == (code, "", text.format(**places))


def test_a_sharded_checkpoint_is_neither_sharded_nor_verified(capsys, small, tmp_path):
    out = tmp_path / "out"
    shard(prepare(small, "tp2", 2), out)
    text = (
        f"error: `{out}` is sharded (tp 2 x edp 2), and this needs the checkpoint that it was made "
        "of\n\nhint: give that one\n"
    )
    words = ["--tp-plan", "tp2", "--model", str(out)]
    assert run(capsys, *words, "--out", tmp_path / "two") == (2, "", text)
    assert (main(["verify", *words]), *capsys.readouterr()) == (2, "", text)


def test_on_a_terminal_a_bar_is_drawn(capsys, small, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = ["--tp-plan", "tp2", "--model", small, "--out", tmp_path / "out"]
    code, _, drawn = run(capsys, *words)
    assert code == 0
    assert "shard" in drawn


def test_the_manifest_is_read_by_people(small, tmp_path):
    shard(prepare(small, "tp2-ep2", 2), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "tpx.json").read_text())
    assert (said["format"], said["world"], said["mesh"]["ep"]) == (1, 2, 2)
    assert said["plan"].startswith("tpx: 1\nmodel: gpt_oss\nmesh: {tp: 2, ep: 2}\n")
    assert said["tensors"]["model.norm.weight"] == ["BF16", [64]]
    assert list(said["files"]) == [file_name(0, 2), file_name(1, 2)]
