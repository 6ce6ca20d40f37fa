"""`tpx generate`: commands and prompts that are refused before a rank starts, word for word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from generating import no_ranks, run, write
from tiny import tiny_checkpoint

from tpx.cli import generate, generate_flags
from tpx.cli.main import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    (folder / "chat_template.jinja").write_text("<user>{{ messages[0].content }}")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    for name in ("TPX_MODEL", "TPX_TP_PLAN", "TPX_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "supervise", no_ranks)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ({"prompt": ""}, "`prompt` is empty", "give it at least one token"),
        ({"prompt": []}, "`prompt` is empty", "give it at least one token"),
        ({"prompt": [1, 263]},
         "`prompt` has token id `263` at place `1`, outside the vocabulary of `263`",
         "ids go from 0 to 262"),
        ({"prompt": "x" * 97}, "`prompt` has `97` tokens, and the model has `96` positions",
         "shorten it by 1 or more tokens"),
        ({"messages": [{"role": "user", "content": "x" * 91}]},
         "`messages` has `97` tokens, and the model has `96` positions",
         "shorten it by 1 or more tokens"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_continue(capsys, tiny, line, message, hint):
    write({"prompt": "the " * 30}, line)
    expected = f"error: `in.jsonl`, line 2: {message}\n\nhint: {hint}\n"
    assert run(capsys, tiny) == (2, expected)
    assert not os.path.exists("out.jsonl.run.json")


def test_what_text_needs_of_a_checkpoint(capsys, tmp_path):
    folder = tiny_checkpoint(tmp_path / "bare")
    chat = {"messages": [{"role": "user", "content": "a"}]}
    hint = "give raw text, or put the model's `chat_template.jinja` into the folder"
    write(chat)
    assert run(capsys, folder) == (
        2, f"error: `in.jsonl`, line 1: `{folder}` has no chat template\n\nhint: {hint}\n"
    )  # fmt: skip
    (folder / "tokenizer.json").unlink()
    hint = "give prompts as lists of token ids, which need no tokenizer"
    stop = {"prompt": [1], "stop": "a"}
    for line, what in ((chat, "`messages`"), ({"prompt": "a"}, "`prompt`"), (stop, "`stop`")):
        write(line)
        said = f"{what} is text, and `{folder}` has no `tokenizer.json`"
        expected = f"error: `in.jsonl`, line 1: {said}\n\nhint: {hint}\n"
        assert run(capsys, folder) == (2, expected)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("", "`tpx generate` needs `--input FILE`",
         'a file with a request a line, such as `{"prompt": "The"}`'),
        ("--input in.jsonl", "`tpx generate` needs `--output FILE`",
         "a file for the results, a line each"),
        ("--inptu x", "`tpx generate` has no flag `--inptu`", "did you mean `--input`?"),
        ("--zzz", "`tpx generate` has no flag `--zzz`", "`tpx generate --help` lists them"),
        ("in.jsonl", "`tpx generate` takes no argument `in.jsonl`",
         f"type `{generate_flags.USAGE}`"),
        ("--input in.jsonl --output out.jsonl", "there is no model to generate text with",
         f"type `{generate_flags.USAGE}`"),
        ("--input in.jsonl --output out.jsonl --nnodes 2",
         "`tpx generate` runs on one machine, and `2` are asked for",
         "run it on each of them, with a part of the requests and an `--output` of its own"),
        ("--model m --input in.jsonl --output out.jsonl --temperature -1",
         "`temperature` is `-1.0`, and must be a number from 0 up",
         "0 picks the likeliest token, 1 draws from the model's own distribution"),
        ("--model m --input in.jsonl --output in.jsonl", "`in.jsonl` is both `--input` and "
         "`--output`", "give another file: `--output FILE`"),
        ("--model m --input in.jsonl --output linked.jsonl", "`linked.jsonl` is both `--input` and "
         "`--output`", "give another file: `--output FILE`"),
        ("--model m --input none --output out.jsonl", "there is no file `none`",
         "give a file: `--input FILE`"),
        ("--model m --input in.jsonl --output a/out.jsonl", "there is no folder `{here}/a`",
         "make it: `mkdir -p {here}/a`"),
        ("--model m --input in.jsonl --output .", "`.` is no file", "give a file: `--output FILE`"),
    ],
)  # fmt: skip
def test_a_wrong_command(capsys, tmp_path, words, message, hint):
    write({"prompt": "a"})
    os.link("in.jsonl", "linked.jsonl")
    code = main(["generate", *words.split()])
    expected = f"error: {message}\n\nhint: {hint}\n".replace("{here}", str(tmp_path))
    assert (code, capsys.readouterr().err) == (2, expected)


def test_a_file_that_may_not_be_written(capsys, tiny, monkeypatch):
    """The superuser may write all files."""
    write({"prompt": "a"})
    monkeypatch.setattr("os.access", lambda path, mode: False)
    hint = "give another file: `--output FILE`"
    said = f"error: `out.jsonl` cannot be written: Permission denied\n\nhint: {hint}\n"
    assert run(capsys, tiny) == (2, said)


def test_the_help_fits_a_terminal(capsys):
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: {generate_flags.USAGE}\n")
    assert max(map(len, out.splitlines())) <= 80


def test_a_recipe_of_one_machine_names_the_ranks(tmp_path):
    words = ["gpt_oss/cpux2", "--input", "a", "--output", "b"]
    asked = generate_flags.parse(words)
    assert asked is not None
    assert (asked.options.recipe, asked.options.nproc) == ("gpt_oss/cpux2", "2")
