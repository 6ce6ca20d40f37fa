"""`tpx generate`: what it says and writes, and what it goes on from; the rank is this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from generating import in_this_process, no_ranks, run, write
from tiny import changed, tiny_checkpoint

import tpx
from tpx.cli import generate
from tpx.launch.report import Ending
from tpx.requests_file import read_requests
from tpx.results import Completion, Result
from tpx.results_file import ANEW, ResultsFile

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    for name in ("TPX_MODEL", "TPX_TP_PLAN", "TPX_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "supervise", in_this_process)


def results() -> dict[object, dict]:
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    found = {one["id"]: one["completions"] for one in lines}
    assert len(found) == len(lines)
    return found


def test_requests_are_continued_and_a_second_run_adds_what_came(capsys, tiny, monkeypatch):
    chat = [{"role": "user", "content": "end"}]
    ids = {"prompt": [7, 8], "max_tokens": 3, "logprobs": 1, "id": "ids"}
    drawn = {"prompt": "é", "temperature": 1.0, "seed": 3, "n": 2}
    lines = [{"prompt": "the"}, ids, {"messages": chat}, drawn]
    write(*lines)
    code, said = run(capsys, tiny)
    assert code == 0
    last = said.splitlines()[-1]
    found = results()
    tokens = sum(len(one["token_ids"]) for completions in found.values() for one in completions)
    assert last.startswith(f"4 requests, {tokens} tokens in ")
    assert last.endswith(" tokens a second")
    with tpx.LLM(tiny, tp_plan="tp1", device="cpu") as llm:
        two = tpx.SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=2)
        three = tpx.SamplingParams(max_tokens=3, logprobs=1)
        six = tpx.SamplingParams(max_tokens=6)
        wanted = llm.generate(["the", [7, 8], "<user>end", "é"], [six, three, six, two])
    there = [*found[0], *found["ids"], *found[2], *found[3]]
    assert [tuple(one.values())[:3] for one in there] == [one[:3] for one in wanted]
    assert found["ids"][0]["logprobs"][0]["logprob"] == wanted[1].logprobs[0].logprob

    write(*lines, {"prompt": "more"})
    before = Path("out.jsonl").read_text()
    with Path("out.jsonl").open("a") as file:
        file.write('{"id": 4, "comp')
    code, said = run(capsys, tiny)
    assert code == 0
    assert "cut off 15 bytes at the end of `out.jsonl`: a line was not whole\n" in said
    assert "4 of 5 requests are done in `out.jsonl`: going on\n" in said
    assert said.splitlines()[-1].startswith("1 request, ")
    assert said.splitlines()[-1].endswith("; 4 were done before")
    assert Path("out.jsonl").read_text().startswith(before)
    assert {*results()} == {0, "ids", 2, 3, 4}

    monkeypatch.setattr(generate, "supervise", no_ranks)
    runs = len(list(Path("runs").iterdir()))
    nothing = "nothing to do: all 5 requests of `in.jsonl` are in `out.jsonl`\n"
    assert run(capsys, tiny) == (0, nothing)
    assert len(list(Path("runs").iterdir())) == runs


def fill(tiny, capsys, *words: object) -> None:
    write({"prompt": "the"}, {"prompt": [7], "id": "b"})
    assert run(capsys, tiny, *words)[0] == 0


def test_what_results_were_made_with_may_not_change(capsys, tiny, tmp_path, monkeypatch):
    fill(tiny, capsys, "--seed", 1)
    monkeypatch.setattr(generate, "supervise", no_ranks)
    begun = "error: `out.jsonl` was begun with"
    for words, was, now in (
        (("--seed", 2), "`--seed 1`", "`--seed 2`"),
        ((), "`--seed 1`", "no `--seed`"),
        (("--seed", 1, "--chat"), "no `--chat`", "`--chat`"),
        (("--seed", 1, "--dtype", "float32"), "`--dtype auto`", "`--dtype float32`"),
        (("--seed", 1, "--temperature", 0.5), "`--temperature 0.0`", "`--temperature 0.5`"),
        (("--seed", 1, "--max-new-tokens", 7), "`--max-new-tokens 6`", "`--max-new-tokens 7`"),
    ):
        expected = f"{begun} {was}, and now there is {now}\n\nhint: write {was}; {ANEW}\n"
        assert run(capsys, tiny, *words) == (2, expected)
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    hint = f"\n\nhint: name that one: `--model`; {ANEW}\n"
    assert run(capsys, other, "--seed", 1) == (
        2, f"{begun} another model than `{other}`: `{tiny}`{hint}"
    )  # fmt: skip
    moved = changed(tiny, tmp_path / "moved", "config.json")
    assert run(capsys, moved, "--seed", 1, "--tp-plan", "tp1")[0] == 0
    (moved / "chat_template.jinja").write_text("other")
    made = Path("out.jsonl.run.json")
    made.write_text(made.read_text().replace(str(tiny), str(moved)))
    assert run(capsys, moved, "--seed", 1) == (
        2, f"{begun} another model than `{moved}`: an earlier state of it{hint}"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message", "hint"),
    [
        (({"prompt": "th"}, {"prompt": [7], "id": "b"}),
         "`in.jsonl`, line 1: request `0` is in `out.jsonl`, and said something else there",
         f"write it as it was, or give it an `id` of its own; {ANEW}"),
        (({"prompt": "the"}, {"prompt": [7], "id": "b", "seed": 1}),
         "`in.jsonl`, line 2: request `b` is in `out.jsonl`, and said something else there",
         f"write it as it was, or give it an `id` of its own; {ANEW}"),
        (({"prompt": "the"},),
         "`out.jsonl` has a result for `b`, and `in.jsonl` no such request",
         f"put it back; {ANEW}"),
        (({"prompt": "the"}, {"prompt": [7], "id": "b"}, {"prompt": [8], "id": 0}),
         "`in.jsonl`, line 3: `id` is `0`, as in line 1",
         "give another one; a line without an `id` has its line's number, from 0 on"),
        ((), "`in.jsonl` has no request", 'write a request a line, such as `{"prompt": "The"}`'),
    ],
)  # fmt: skip
def test_what_is_done_may_not_be_edited(capsys, tiny, monkeypatch, lines, message, hint):
    write({"prompt": "the"}, {"prompt": [7], "id": "b"})
    pretend_done(capsys, tiny, monkeypatch)
    write(*lines)
    assert run(capsys, tiny) == (2, f"error: {message}\n\nhint: {hint}\n")


def pretend_done(capsys, tiny, monkeypatch) -> None:
    """Results of all requests, without ranks."""

    def supervise(job, options, drawer) -> Ending:
        file = ResultsFile("out.jsonl")
        for line in read_requests("in.jsonl", {}, False):
            file.add(Result(line.id, [Completion("", [1], "stop")]), line.digest)
        file.close()
        return Ending(0)

    monkeypatch.setattr(generate, "supervise", supervise)
    assert run(capsys, tiny)[0] == 0
    monkeypatch.setattr(generate, "supervise", no_ranks)


def test_what_is_not_done_may_be_edited(capsys, tiny, monkeypatch):
    """So that a line that the ranks refuse can be mended."""
    write({"prompt": "the"})
    pretend_done(capsys, tiny, monkeypatch)
    started = []
    monkeypatch.setattr(generate, "supervise", lambda *_: started.append(1) or Ending(0))
    for second in ({"prompt": "a"}, {"prompt": "b"}):
        write({"prompt": "the"}, second)
        assert run(capsys, tiny)[0] == 0
    assert started == [1, 1]


def test_starting_over(capsys, tiny):
    fill(tiny, capsys)
    write({"prompt": "end"})
    code, said = run(capsys, tiny, "--restart", "--seed", 5)
    assert code == 0
    assert "cut off" not in said
    assert said.splitlines()[-1].startswith("1 request, 6 tokens in ")
    assert {*results()} == {0}
    assert json.loads(Path("out.jsonl.run.json").read_text())["flags"]["seed"] == 5


def test_a_job_that_fails_says_how_to_go_on(capsys, tiny, monkeypatch):
    write({"prompt": "the"})
    pretend_done(capsys, tiny, monkeypatch)
    write({"prompt": "the"}, {"prompt": "end"})
    failed = Ending(5, "error: rank 1 was killed")
    monkeypatch.setattr(generate, "supervise", lambda *_: failed)
    code, said = run(capsys, tiny)
    assert code == 5
    assert said.splitlines()[-2:] == [
        "error: rank 1 was killed",
        "1 of 2 requests are in `out.jsonl`: the same command goes on from there",
    ]
