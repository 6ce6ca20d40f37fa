"""What `tpx launch` runs without a script, in a process by itself."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from tiny import tiny_checkpoint

import tpx
from tpx.errors import RequestError
from tpx.generate import (
    Speed,
    load_lines,
    main,
    place_name,
    print_report,
    size,
    speed_line,
)
from tpx.launch.command import generation
from tpx.launch.options import Options
from tpx.mesh import Coords, Mesh
from tpx.results import RankReport, Report


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def write(tiny, monkeypatch, **options) -> None:
    monkeypatch.setenv("TPX_MODEL", str(tiny))
    monkeypatch.setenv("TPX_TP_PLAN", "tp1")
    main(json.dumps(generation(Options(**options))._asdict()))


def continuation(tiny, prompt: str, **settings) -> str:
    with tpx.LLM(tiny, tp_plan="tp1") as llm:
        return llm.generate([prompt], tpx.SamplingParams(**settings))[0].text


def test_one_prompt_is_streamed_after_the_prompt_itself(tiny, monkeypatch, capsys):
    write(tiny, monkeypatch, prompt=("the end",), max_new_tokens=9, temperature=1.0, seed=4)
    captured = capsys.readouterr()
    expected = continuation(tiny, "the end", max_tokens=9, temperature=1.0, seed=4)
    assert captured.out == f"the end{expected}\n"
    last = captured.err.splitlines()[-1]
    assert last.startswith("9 tokens in ")
    assert last.endswith(" tokens a second")


def test_several_prompts_are_written_one_after_the_other(tiny, monkeypatch, capsys):
    write(tiny, monkeypatch, prompt=("the", "end"), max_new_tokens=6)
    captured = capsys.readouterr()
    texts = [continuation(tiny, prompt, max_tokens=6) for prompt in ("the", "end")]
    assert captured.out == f"the{texts[0]}\n\nend{texts[1]}\n"


def test_without_a_prompt_the_default_is_continued(tiny, monkeypatch, capsys):
    write(tiny, monkeypatch, max_new_tokens=2)
    assert capsys.readouterr().out.startswith("The")


def test_a_chat_shows_the_answer_alone(tiny, monkeypatch, capsys, tmp_path):
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    folder = tiny_checkpoint(tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(template)
    write(folder, monkeypatch, prompt=("hello",), chat=True, max_new_tokens=6)
    assert capsys.readouterr().out == continuation(folder, "<user>hello", max_tokens=6) + "\n"


def test_text_without_a_tokenizer(monkeypatch, tmp_path):
    folder = tiny_checkpoint(tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    for chat in (False, True):
        with pytest.raises(RequestError, match=r"is text, and .* has no `tokenizer.json`"):
            write(folder, monkeypatch, prompt=("hello",), chat=chat)


def test_the_report_fits_a_terminal(tiny):
    console = Console(file=io.StringIO(), width=80)
    with tpx.LLM(tiny, tp_plan="tp1") as llm:
        print_report(llm, console)
        [rank] = llm.report.ranks
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert f"{rank.bytes_read:,} B" in console.file.getvalue()
    assert "mesh one rank, plan plans/gpt_oss/tp1.yaml" in lines


def test_the_report_says_what_loading_cost():
    seconds = {"seconds": 2.6, "read_seconds": 2.5, "copy_seconds": 1.25, "prepare_seconds": 0.0}
    nbytes = {
        "bytes_read": 30,
        "bytes_kept": 20,
        "bytes_received": 0,
        "bytes_held": 40,
        "host_peak": 12_750_096,
    }
    rank = RankReport(0, Coords(0, 0, 0, 0, 0), "cpu", device_peak=None, **seconds, **nbytes)
    said = (
        "loaded in 2.60 s (read 2.50 s, copy 1.25 s, prepare 0.00 s)\n"
        "read 1.50x of what is kept, with at most 12.8 MB of host memory beside it"
    )
    assert load_lines(Report(Mesh(), "p", (), (rank,))) == said
    on_gpu = Report(Mesh(), "p", (), (rank._replace(device_peak=1.023),))
    assert load_lines(on_gpu) == f"{said}\ndevice memory at most 1.02x of what is held"


def test_figures_are_exact_where_they_fit():
    assert size(1234567) == "1,234,567 B"
    assert size(12_345_678_901) == "12,345.7 MB"
    assert speed_line(Speed(30, 1.5)) == "30 tokens in 1.50 s: 20.0 tokens a second"


def test_a_place_names_the_axes_that_are_cut():
    mesh = Mesh(tp=2, ep=2)
    assert place_name(mesh, Coords(0, 1, 0, 1, 0)) == "tp 1, ep 1"
    assert place_name(Mesh(), Coords(0, 0, 0, 0, 0)) == ""
