"""Plots of `tpx bench --html`, as SVG: lines over the batch, and bars. No meaning in colour alone:
lines have marks of their own, parts of a bar are named below it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 44
MARKS = (  # around (0, 0)
    '<circle r="4.5"/>',
    '<rect x="-4" y="-4" width="8" height="8"/>',
    '<path d="M0-5.5 5 4H-5Z"/>',
    '<path d="M0-5.5 5.5 0 0 5.5-5.5 0Z"/>',
    '<path d="M-5-4H5L0 5.5Z"/>',
)
COLOURS = 5
ROW, BAR = 46, 18


class Line(NamedTuple):
    """points: (x, y), both above 0, on logarithmic axes. floor: dashed, without marks."""

    name: str
    points: list[tuple[float, float]]
    floor: bool = False


class Bar(NamedTuple):
    """parts: (name, value), one behind the other. said: what stands at its end."""

    name: str
    parts: list[tuple[str, float]]
    said: str


class Axis(NamedTuple):
    """From `least` to `most`, both above 0, to pixels."""

    least: float
    most: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        if self.most == self.least:
            return (self.begin + self.end) / 2
        share = log10(value / self.least) / log10(self.most / self.least)
        return self.begin + share * (self.end - self.begin)


def lines(series: Sequence[Line], x_name: str, y_name: str) -> str:
    xs = sorted({x for line in series for x, _ in line.points})
    ticks = y_ticks([y for line in series for _, y in line.points])
    across = Axis(xs[0], xs[-1], LEFT + 24, WIDTH - RIGHT - 24)
    up = Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    grid = [
        f'<path class="grid" d="M{LEFT} {up.at(y):.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="end" x="{LEFT - 8}" y="{up.at(y) + 4:.1f}">{number(y)}</text>'
        for y in ticks
    ]
    grid += [
        f'<text class="middle" x="{across.at(x):.1f}" y="{HEIGHT - BOTTOM + 18}">{number(x)}</text>'
        for x in xs
    ]
    grid.append(
        f'<text class="middle soft" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}">{x_name}</text>'
    )
    drawn = [_line(line, i, across, up, y_name) for i, line in enumerate(series)]
    return _svg(f"{y_name} by {x_name}", HEIGHT, [*grid, *drawn]) + _legend(series, y_name)


def _line(line: Line, index: int, across: Axis, up: Axis, y_name: str) -> str:
    places = [(across.at(x), up.at(y)) for x, y in line.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    if line.floor:
        return f'<path class="floor" d="M{path}"/>'
    marks = "".join(
        f'<g class="mark" transform="translate({x:.1f} {y:.1f})"><title>{escape(line.name)}: '
        f"{number(value)} {y_name} at {number(at)}</title>{MARKS[index % len(MARKS)]}</g>"
        for (x, y), (at, value) in zip(places, line.points, strict=True)
    )
    return f'<g class="s{index % COLOURS}"><path class="line" d="M{path}"/>{marks}</g>'


def _legend(series: Sequence[Line], y_name: str) -> str:
    items = []
    for index, line in enumerate(series):
        mark = MARKS[index % len(MARKS)]
        sign = (
            '<path class="floor" d="M-14 0H14"/>'
            if line.floor
            else f'<path class="line" d="M-14 0H14"/><g class="mark">{mark}</g>'
        )
        items.append(
            f'<span class="s{index % COLOURS}"><svg aria-hidden="true" width="32" height="14" '
            f'viewBox="-16 -7 32 14">{sign}</svg>{escape(line.name)}</span>'
        )
    return f'<p class="legend"><span class="soft">{y_name}:</span>{"".join(items)}</p>'


def bars(rows: Sequence[Bar]) -> str:
    """From 0, on one scale."""
    longest = max((sum(value for _, value in row.parts) for row in rows), default=0.0) or 1.0
    scale = (WIDTH - 130) / longest
    drawn = []
    for index, row in enumerate(rows):
        y, x = index * ROW, 0.0
        drawn.append(f'<text x="0" y="{y + 14}">{escape(row.name)}</text>')
        for place, (name, value) in enumerate(row.parts):
            drawn.append(
                f'<rect class="bar s{place % COLOURS}" x="{x:.1f}" y="{y + 20}" '
                f'width="{max(value * scale, 0.5):.1f}" height="{BAR}"><title>{escape(name)}: '
                f"{number(value)}</title></rect>"
            )
            x += value * scale
        drawn.append(f'<text x="{x + 8:.1f}" y="{y + 20 + BAR / 2 + 4}">{escape(row.said)}</text>')
    return _svg("bars", len(rows) * ROW, drawn) + _parts(rows)


def _parts(rows: Sequence[Bar]) -> str:
    names = list(dict.fromkeys(name for row in rows for name, _ in row.parts))
    if all(len(row.parts) == 1 for row in rows):
        return ""
    items = "".join(
        f'<span class="s{i % COLOURS}"><i class="swatch">{i + 1}</i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend"><span class="soft">from left to right:</span>{items}</p>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height:.0f}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def y_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 of each decade, from below the least to above the most."""
    decades = range(floor(log10(min(values))), ceil(log10(max(values))) + 1)
    every = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    least = max(tick for tick in every if tick <= min(values) * (1 + 1e-9))
    most = min(tick for tick in every if tick >= max(values) * (1 - 1e-9))
    return [tick for tick in every if least <= tick <= most]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
