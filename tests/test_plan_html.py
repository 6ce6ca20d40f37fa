"""The page of `tpx plan explain --html`: complete in itself, and with the numbers of `--json`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from headers import write_folder

from tpx.cli.main import main
from tpx.cli.plan_html import TEMPLATE, page
from tpx.cli.plan_json import as_json
from tpx.cli.plan_words import size
from tpx.plan.explain import explain
from tpx.plan.find import shipped_plans
from tpx.plan.prepare import prepare

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "br"}
ASKS = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}


class Page(HTMLParser):
    """What stands where. numbers: (class of the element around, exact value, text) of <data>."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.numbers: list[tuple[str, float, str]] = []
        self.json, self.text = "", ""
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag == "data":
            around = self.open[-1][1].get("class", "")
            self.numbers.append((around, float(found["value"]), ""))
        if tag not in VOID:
            self.open.append((tag, found))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"{tag} at {self.getpos()}"

    def handle_data(self, data):
        names = [tag for tag, _ in self.open]
        if "script" in names:
            self.json += data
        elif "style" not in names:
            self.text += data
        if "data" in names:
            around, value, text = self.numbers[-1]
            self.numbers[-1] = around, value, text + data


PLANS = [(name, 0) for name in ("tp1", "tp4-etp4", "dp2-tp2-ep2-etp2")] + [("auto", 8)]


@pytest.fixture(scope="module", params=PLANS, ids=lambda plan: plan[0])
def made(request, tmp_path_factory):
    name, world = request.param
    folder = write_folder(tmp_path_factory.mktemp("page"))
    world = world or {"tp1": 1}.get(name, 4)
    prepared = prepare(folder, name, world)
    explained = explain(prepared, 100, 4)
    return prepared, explained, page(prepared, explained)


def test_it_carries_what_json_prints(made):
    prepared, explained, text = made
    assert json.loads(Page(text).json) == json.loads(json.dumps(as_json(prepared, explained)))


def test_no_request_can_leave_it(made):
    """No address of anything else, no script that runs, and a policy that would refuse both."""
    found = Page(made[2])
    asks = {(tag, value) for tag, attrs in found.tags for name, value in attrs.items()
            if name in ASKS and not value.startswith("#")}  # fmt: skip
    assert asks == {("link", "data:,")}
    assert not re.search(r"https?:|@import|//[a-z]", made[2].partition("<body>")[0])
    assert set(re.findall(r"url\([^)]*\)", made[2])) <= {"url(#hatch)"}
    scripts = [attrs["type"] for tag, attrs in found.tags if tag == "script"]
    assert scripts == ["application/json"]
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    policy = next(a["content"] for _, a in found.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_shown_numbers_are_those_of_json(made):
    prepared, explained, text = made
    found, values = Page(text), as_json(prepared, explained)
    cells = [value for name, value, _ in found.numbers if "cells" in name.split()]
    ranks = min(prepared.world, 8)
    rows = [cells[at : at + ranks] for at in range(0, len(cells), ranks)]
    assert rows[-1] == list(values["rank_bytes"][:ranks])
    assert [sum(column) for column in zip(*rows[:-1], strict=True)] == rows[-1]
    shown = {int(value) for _, value, _ in found.numbers}
    for each in values["ranks"]:
        parts = ("weights", "kv_cache", "pages", "logits", "activations", "total")
        assert {each[part] for part in parts} <= shown
    for rule in values["rules"]:
        assert rule["bytes"] in shown
        assert {kind["bytes"] for kind in rule["parameters"] if "bytes" in kind} <= shown
        assert rule["pattern"] in found.text
    for proof in values["proofs"]:
        assert proof["text"].replace("`", "") in found.text
    assert values["digest"] in found.text


def test_a_number_reads_as_its_value_says(made):
    found = Page(made[2])
    assert len(found.numbers) > 40
    for _, value, text in found.numbers:
        if "bytes" in text:
            assert text.startswith(f"{value:,.0f} bytes"), f"{value} {text}"
        else:
            assert text.replace("\N{NO-BREAK SPACE}", " ") == size(value)


def test_every_collective_of_both_phases_is_a_wire(made):
    prepared, explained, text = made
    titles = re.findall(r"<title>([^<]*)</title>", text)
    steps = dict.fromkeys((*explained.prefill, *explained.decode))
    for step in steps:
        mesh = prepared.plan.mesh
        groups = dict.fromkeys(mesh.group(step.group, rank) for rank in range(prepared.world))
        said = "; ".join(", ".join(map(str, group)) for group in groups)
        assert f"{step.op} of {step.name} between ranks {said}" in titles


def test_pictures_have_titles_and_no_meaning_is_in_colour_alone(made):
    found = Page(made[2])
    pictures = [attrs for tag, attrs in found.tags if tag == "svg"]
    named = [attrs for attrs in pictures if attrs.get("role") == "img"]
    hidden = [attrs for attrs in pictures if attrs.get("aria-hidden") == "true"]
    assert len(named) + len(hidden) == len(pictures)
    assert made[2].count("<title>") == len(named) + 1
    marks = re.findall(r'class="mark[^"]*"', made[2])
    assert bool(marks) == (made[0].world > 1)


def test_many_ranks_are_grouped(tmp_path):
    path = tmp_path / "big.yaml"
    text = shipped_plans("gpt_oss")["dp2-tp2-ep2-etp2"].read_text()
    path.write_text(text.replace("dp: 2, tp: 2, ep: 2, etp: 2", "dp: 8, tp: 2, ep: 8, etp: 2"))
    prepared = prepare(write_folder(tmp_path), str(path), 16)
    found = Page(page(prepared, explain(prepared)))
    assert "ranks 0, 2, ... (8)" in found.text
    assert "Ranks 0 to 7 of 16; a dashed wire goes on to ranks that are not drawn." in found.text


def test_text_from_outside_stays_text(tmp_path):
    """A plan's path may hold anything that a file's name may."""
    folder = tmp_path / "<b>&$title"
    folder.mkdir()
    path = folder / "x<script>alert(1)<.yaml"
    path.write_text(shipped_plans("gpt_oss")["tp2"].read_text())
    prepared = prepare(write_folder(tmp_path), str(path), 2)
    text = page(prepared, explain(prepared))
    found = Page(text)
    assert "<script>alert" not in text
    assert str(path) in found.text
    assert json.loads(found.json)["plan"] == str(path)


def luminance(colour: str) -> float:
    """Relative, of WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted(map(luminance, (first, second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_in_both_modes(mode):
    """4.5 to 1 for text, 3 to 1 for what is drawn: WCAG 2.2, 1.4.3 and 1.4.11."""
    blocks = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[mode == "dark"]))
    pairs = [(f"h{step}", f"t{step}") for step in range(8)]
    pairs += [("paper", "ink"), ("paper", "soft"), ("sheet", "soft"), ("compute", "compute-ink")]
    pairs += [("paper", "accent")]
    for below, above in pairs:
        assert contrast(colours[below], colours[above]) >= 4.5, f"{mode} {below} {above}"
    for drawn in ("weights", "activations", "logits"):
        assert contrast(colours["paper"], colours[drawn]) >= 3, f"{mode} {drawn}"


def test_the_file_is_written_and_named(capsys, tmp_path):
    path = tmp_path / "plan.html"
    argv = ["plan", "explain", "tp2", "--model", str(write_folder(tmp_path)), "--html", str(path)]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>\n")


@pytest.mark.more
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_without_network_draws_it(tmp_path, width):
    """It keeps the page as it was written, and reports nothing that it missed or refused."""
    prepared = prepare(write_folder(tmp_path), "dp2-tp2-ep2-etp2", 4)
    path = tmp_path / "plan.html"
    path.write_text(page(prepared, explain(prepared)), encoding="utf-8")
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
             f"--window-size={width},2000", "--enable-logging=stderr"]  # fmt: skip
    for extra in (["--dump-dom"], [f"--screenshot={picture}"]):
        done = subprocess.run(
            [str(CHROMIUM), *flags, *extra, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        assert not re.search(r"CONSOLE|net::ERR|Refused to", done.stderr), done.stderr
        if extra == ["--dump-dom"]:
            assert Page(done.stdout).json == Page(path.read_text(encoding="utf-8")).json
    assert picture.stat().st_size > 50_000
