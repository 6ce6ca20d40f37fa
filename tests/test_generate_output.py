"""The file of results: whenever a job is killed, each request is there once in the end."""

from __future__ import annotations

import json
import os
import random
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings, strategies as st

from tpx import results_file
from tpx.cli.generate import check_input
from tpx.cli.generate_flags import Asked
from tpx.errors import LaunchError, RequestError
from tpx.generate_file import Told, remaining
from tpx.launch.options import Options
from tpx.requests_file import read_requests
from tpx.results import Completion, Likely, Result
from tpx.results_file import ANEW, REMOVE, Made, ResultsFile, begin, look, read_made

MADE = Made("m", "0" * 64, {"seed": None})
ODD = '\n\r\0\u2028é"\\'  # what could end a line, or be taken for lost bytes


def result(name: str | int) -> Result:
    likely = [Likely(-0.5, ((1, -0.5), (2, -1.25)))]
    return Result(name, [Completion(f"{name}{ODD}", [1], "stop", likely)])


def results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True)]


def job(source: Path, target: Path, seed: int = 0) -> tuple[int, int]:
    """All that is left, in some order of ending -> bytes of the file before and after."""
    asked = Asked(str(source), str(target), False, Options())
    done, _ = look(asked.target, False)
    total = check_input(asked, done)
    begin(asked.target, MADE, done)
    if len(done.digests) == total:
        return done.whole, done.whole
    file = ResultsFile(asked.target)
    left = [line for line in read_requests(asked.source, {}, False) if line.id not in done.digests]
    random.Random(seed).shuffle(left)
    for line in left:
        file.add(result(line.id), line.digest)
    file.close()
    return done.whole, target.stat().st_size


KILLS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5), st.integers(0, 9)), max_size=5)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 99) | st.text(max_size=3), unique=True, min_size=1, max_size=8),
       kills=KILLS)  # fmt: skip
def test_a_job_that_is_killed_at_any_byte_goes_on_and_does_nothing_twice(ids, kills):
    """Bytes that the power did not let the disk keep are zeros."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        source, target = Path(folder, "in"), Path(folder, "out")
        source.write_text("".join(json.dumps({"prompt": "a", "id": name}) + "\n" for name in ids))
        for share, zeros, seed in kills:
            before, after = job(source, target, seed)
            kept = before + int(share * (after - before))
            os.truncate(target, kept)
            os.truncate(target, kept + zeros)
        job(source, target)
        there = results(target)
        assert sorted(map(repr, (one["id"] for one in there))) == sorted(map(repr, ids))
        for one in there:
            assert one["completions"][0]["text"] == f"{one['id']}{ODD}"
        size = target.stat().st_size
        assert job(source, target) == (size, size)


def test_a_line_is_what_the_request_gave(tmp_path):
    target = tmp_path / "out"
    file = ResultsFile(str(target))
    file.add(result("a"), "d" * 16)
    file.add(Result(3, [Completion("x", [5, 6], "length"), Completion("", [], "stop")]), "e" * 16)
    file.close()
    likely = [{"logprob": -0.5, "top": [[1, -0.5], [2, -1.25]]}]
    first = {"text": f"a{ODD}", "token_ids": [1], "finish_reason": "stop", "logprobs": likely}
    second = {"text": "x", "token_ids": [5, 6], "finish_reason": "length"}
    third = {"text": "", "token_ids": [], "finish_reason": "stop"}
    assert results(target) == [
        {"id": "a", "completions": [first], "request": "d" * 16},
        {"id": 3, "completions": [second, third], "request": "e" * 16},
    ]


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path):
    target = tmp_path / "out"
    file = ResultsFile(str(target))
    file.add(result("a"), "d")
    size = target.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(LaunchError) as found:
            file.add(result("b"), "d")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.value.message == f"`{target}` cannot be written: File too large"
    assert found.value.hint == "make room, and type the same command: what is in the file is kept"
    assert found.value.exit_code == 4
    assert target.stat().st_size == size
    file.add(result("b"), "d")
    assert [one["id"] for one in results(target)] == ["a", "b"]


def test_results_are_on_the_disk_after_some_seconds_and_at_the_end(tmp_path, monkeypatch):
    synced, now = [], [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    file = ResultsFile(str(tmp_path / "out"))
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(now[0]))
    for second in (1, 4, 5, 6, 9, 10):
        now[0] = 100.0 + second
        file.add(result(second), "d")
    file.close()
    assert synced == [105.0, 110.0, 110.0]


def test_two_jobs_do_not_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "PATIENCE", 0.0)
    target = str(tmp_path / "out")
    results_file.put(results_file.beside(target), json.dumps(MADE._asdict()))
    first = ResultsFile(target)
    first.add(result("a"), "d")
    for again in (lambda: ResultsFile(target), lambda: look(target, False)):
        with pytest.raises(RequestError) as found:
            again()
        assert found.value.message == f"another job writes `{target}`"
        assert found.value.hint == "let it end, or give another file"
    first.close()
    ResultsFile(target).close()


def good(name: str) -> str:
    return json.dumps({"id": name, "completions": [], "request": "d"}) + "\n"


@pytest.mark.parametrize(
    ("text", "made", "message", "hint"),
    [
        ("notes", None, "`{0}` has something in it, and no `{0}.run.json` says that it is results",
         REMOVE),
        (good("a"), "{", "`{0}.run.json`, which says what made `{0}`, cannot be read", REMOVE),
        (good("a"), "[1]", "`{0}.run.json`, which says what made `{0}`, cannot be read", REMOVE),
        (good("a") + "notes\n", MADE, "`{0}`, line 2: this is no result of `tpx generate`",
         f"remove the line; {ANEW}"),
        (good("a") + '{"id": 1}\n' + good("b"), MADE,
         "`{0}`, line 2: this is no result of `tpx generate`", f"remove the line; {ANEW}"),
        (good("a") + good("b") + good("a"), MADE, "`{0}`, line 3: `a` is there twice",
         f"remove one; {ANEW}"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_results(tmp_path, text, made, message, hint):
    target = tmp_path / "out"
    target.write_text(text)
    if made is not None:
        said = made if isinstance(made, str) else json.dumps(made._asdict())
        Path(f"{target}.run.json").write_text(said)
    with pytest.raises(RequestError) as found:
        look(str(target), False)
    assert found.value.message == message.format(target)
    assert found.value.hint == hint
    assert target.read_text() == text


def test_what_follows_bytes_that_a_power_cut_took_is_done_again(tmp_path):
    target = tmp_path / "out"
    rest = "\0\0\n" + good("b")
    target.write_text(good("a") + rest)
    assert results_file.read_done(str(target)) == ({"a": "d"}, len(good("a")), len(rest))


def test_a_file_that_grew_since_it_was_read_is_anothers(tmp_path):
    target = tmp_path / "out"
    target.write_text(good("a"))
    done = results_file.read_done(str(target))
    target.write_text(good("a") + good("b"))
    with pytest.raises(RequestError) as found:
        begin(str(target), MADE, done)
    assert found.value.message == f"another job writes `{target}`"
    assert target.read_text() == good("a") + good("b")


def test_starting_over_throws_away_results_and_nothing_else(tmp_path):
    target = tmp_path / "out"
    target.write_text(good("a") + "notes\n")
    with pytest.raises(RequestError, match="has something in it"):
        look(str(target), True)
    results_file.put(results_file.beside(str(target)), json.dumps(MADE._asdict()))
    done, made = look(str(target), True)
    assert (done.digests, made) == ({}, MADE)
    new = MADE._replace(model="other")
    begin(str(target), new, done)
    assert (target.read_bytes(), read_made(str(target))) == (b"", new)


def test_requests_that_change_while_they_are_read(tmp_path):
    """An id that is under way comes again. Token ids need no model."""
    source = tmp_path / "in"
    source.write_text('{"prompt": [1]}\n{"prompt": [2]}\n{"prompt": [3], "id": 1}\n')
    told = Told(str(source), "out", 3, False, None, {}, {})
    digests = dict[str | int, str]()
    asked = remaining(None, told, {0}, digests)  # type: ignore[arg-type]
    assert next(asked).prompt == [2]
    assert [*digests] == [1]
    with pytest.raises(RequestError) as found:
        next(asked)
    assert found.value.message == f"`{source}` changed while it was read"
    assert found.value.hint == "start again"


def test_what_says_how_results_were_made_is_whole_or_not_there(tmp_path):
    blocked = tmp_path / "out.run.json"
    (tmp_path / "out.run.json.part").mkdir()
    with pytest.raises(LaunchError) as found:
        begin(str(tmp_path / "out"), MADE, results_file.Done({}))
    assert found.value.message == f"`{blocked}` cannot be written: Is a directory"
    assert found.value.hint == "make room, or give another file"
    assert not blocked.exists()
