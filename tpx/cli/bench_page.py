"""`tpx bench --html`: one page of what was measured, with plots, complete in itself.

It carries the numbers of `--json`.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..errors import PlanError
from ..version import __version__
from .bench_plots import Bar, Line, bars, lines
from .bench_table import PARTS, TABLES, head, ms, ratios
from .plan_words import size

TEMPLATE = Path(__file__).with_name("bench_page.html")
Found = dict[str, Any]
TITLES = {
    "latency": "Latency",
    "throughput": "Throughput",
    "load": "From a process to its first token",
}


def write_page(path: str, found: Found) -> None:
    """Raises PlanError where the file cannot be written."""
    try:
        Path(path).write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"`--html {path}` cannot be written: {error.strerror}",
            "give a file in a folder that is there",
        ) from error


def page(found: Found) -> str:
    title = f"{TITLES[found['bench']]}: {found['model']['name']}"
    body = [
        f"<header><h1>{escape(title)}</h1>",
        *(f'<p class="soft">{escape(line)}</p>' for line in head(found)),
        f"{_ratios(found)}</header>",
        *PLOTS[found["bench"]](found),
        _section("Numbers", "As the command prints them.", _table(found)),
        f"<footer>Written by tpx {__version__}.</footer>",
    ]
    told = json.dumps(found, indent=1).replace("<", "\\u003c")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(body), json=told)


def _section(title: str, lead: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p>{body}</section>'


def _table(found: Found) -> str:
    return f"<pre>{escape(chr(10).join(TABLES[found['bench']](found)))}</pre>"


def _ratios(found: Found) -> str:
    if not found.get("peer"):
        return ""
    cells = "".join(
        f"<div><dt>{batch or 'tpx over '}{found['peer']['name']}</dt><dd>{value:.2f}"
        f"<small>times as fast</small></dd></div>"
        for batch, value in ratios(found)
    )
    return f'<dl class="figures">{cells}</dl>'


def _latency(found: Found) -> list[str]:
    ways = list(dict.fromkeys(row["way"] for row in found["rows"]))

    def line(way: str, key: str, factor: float = 1.0) -> Line:
        rows = [row for row in found["rows"] if row["way"] == way]
        return Line(way, [(row["batch"], factor * row[key]) for row in rows])

    mine = [row for row in found["rows"] if row["way"] == ways[0]]
    floor = Line("floor", [(row["batch"], 1000 * row["floor"]) for row in mine], floor=True)
    speed = [line(way, "tokens_per_second") for way in ways]
    token = [line(way, "token", 1000) for way in ways]
    first = [line(way, "first_token", 1000) for way in ways]
    return [
        _section("Tokens a second", "Of all sequences, their prompts' time included.",
                 lines(speed, "sequences at once", "tokens a second")),
        _section("Time a token", "Of a step after the first token, and the least that reading "
                 "what it touches takes.", lines([*token, floor], "sequences at once", "ms")),
        _section("Time to the first token", "Until every sequence has one.",
                 lines(first, "sequences at once", "ms")),
    ]  # fmt: skip


def _throughput(found: Found) -> list[str]:
    speed = [
        Bar(row["way"], [("output", row["output_per_second"])], f"{row['output_per_second']:,.0f}")
        for row in found["rows"]
    ]
    plots = [_section("Output tokens a second", "Of all requests.", bars(speed))]
    for key, title in (("first_token", "Time to the first token"), ("token", "Time a token")):
        rows = [row for row in found["rows"] if row[key]]
        times = [
            Bar(f"{row['way']}, {name}", [(name, value)], f"{ms(value)} ms")
            for row in rows
            for name, value in row[key].items()
        ]
        if times:
            plots.append(
                _section(title, "What half, 90% and 99% of the requests saw.", bars(times))
            )
    return plots


def _load(found: Found) -> list[str]:
    seconds = [
        Bar(row["way"], [(PARTS[part], row["parts"][part]) for part in PARTS],
            f"{row['seconds']:.2f} s") for row in found["rows"]
    ]  # fmt: skip
    memory = [
        Bar(f"{row['way']}: {name}", [(name, row[key])], size(row[key]))
        for row in found["rows"]
        for key, name in (("host_peak", "host"), ("device_peak", "device"))
        if row[key]
    ]
    return [
        _section("Seconds, by part", "The slowest rank's.", bars(seconds)),
        _section("Peak memory of a rank", "Mapped files included.", bars(memory)),
    ]


PLOTS = {"latency": _latency, "throughput": _throughput, "load": _load}
