"""Pictures of an explained plan, as HTML and SVG: the heat map of bytes, the mesh, the memory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10

from ..families.layout import Layout
from ..mesh import Mesh
from ..plan.explain import Alike, Explained, Memory
from ..plan.modules import modules_of
from .plan_words import named, place, plural, size

MOST_COLUMNS = 8  # ranks drawn one by one
MOST_CHIPS = 64
DECADES = ("B", "10 kB", "100 kB", "1 MB", "10 MB", "100 MB", "1 GB", "10 GB")
MEMORY = (
    ("weights", "weights", "exact"),
    ("kv_cache", "KV cache", "exact"),
    ("pages", "page rounding", "exact"),
    ("logits", "logits", "exact"),
    ("activations", "activations", "estimated"),
)


def data(nbytes: float, classes: str = "") -> str:
    """The number as people read it, with the exact one in `value`."""
    number, unit = size(nbytes).split(" ")
    name = f' class="{classes}"' if classes else ""
    return f'<data value="{nbytes:.0f}"{name}>{number}<span class="unit"> {unit}</span></data>'


def heat_class(nbytes: float) -> str:
    """A step a decade, from under 10 kB to 10 GB and more."""
    return f"h{min(max(floor(log10(nbytes)) - 3, 0), len(DECADES) - 1)}" if nbytes else "h0"


def heat_map(explained: Explained, layout: Layout) -> str:
    """Modules x ranks; ranks of equal sizes are one column where there are many ranks."""
    columns = _columns(explained)
    heads = "".join(f"<span>{escape(_head(ranks))}</span>" for ranks, _ in columns)
    dense = " dense" if len(columns) > 4 else ""
    rows = [
        _strip(
            '<span class="soft">rank</span>',
            f'<div class="cells heads" aria-hidden="true">{heads}</div>',
        )
    ]
    for module, nbytes in _module_bytes(explained, layout):
        label, copies = _label(module, layout)
        cells = "".join(data(nbytes[column], heat_class(nbytes[column])) for _, column in columns)
        name = f"<span>{escape(label)}</span> <span class='copies'>{copies}</span>"
        rows.append(_strip(name, f'<div class="cells{dense}">{cells}</div>'))
    totals = [explained.alike[column].memory.weights for _, column in columns]
    cells = "".join(data(total) for total in totals)
    rows.append(_strip("all weights", f'<div class="cells{dense}">{cells}</div>', "strip total"))
    return f'<div class="heat" style="--n:{len(columns)}">{"".join(rows)}{_scale()}</div>'


def _columns(explained: Explained) -> list[tuple[Sequence[int], int]]:
    """Ranks, and which of `alike` they are."""
    of = {rank: at for at, alike in enumerate(explained.alike) for rank in alike.ranks}
    if len(of) <= MOST_COLUMNS:
        return [((rank,), of[rank]) for rank in sorted(of)]
    return [(alike.ranks, at) for at, alike in enumerate(explained.alike)]


def _head(ranks: Sequence[int]) -> str:
    return named(ranks) if len(ranks) > 1 else str(ranks[0])


def _module_bytes(explained: Explained, layout: Layout) -> list[tuple[str, list[int]]]:
    each = {kind.name: kind.each for row in explained.rows for kind in row.kinds}
    return [
        (module, [sum(column) for column in zip(*(each[name] for name in kinds), strict=True)])
        for module, kinds in modules_of(layout).items()
    ]


def _label(module: str, layout: Layout) -> tuple[str, str]:
    """A module without what all have in front, and how many copies it stands for."""
    before, star, after = module.partition(".*.")
    copies = len(next(iter(modules_of(layout)[module].values())))
    return (after, f"x {copies} layers") if star else (before.removeprefix("model."), "")


def _strip(name: str, cells: str, classes: str = "strip") -> str:
    return f'<div class="{classes}"><div class="name">{name}</div>{cells}</div>'


def _scale() -> str:
    words = ["under 10 kB", *(f"{word} +" for word in DECADES[1:])]
    spans = "".join(f'<span class="h{i}">{word}</span>' for i, word in enumerate(words))
    return f'<div class="legend scale">{spans}</div>'


def mesh_views(mesh: Mesh) -> str:
    """The dense view, a row a dp group, and the expert view, a row a replica of the experts."""
    dense = [
        (f"dp {i}", [(r, f"tp {r % mesh.tp}") for r in _row(i, mesh.tp)]) for i in range(mesh.dp)
    ]
    expert = [
        (f"edp {i}", [(r, place(mesh, mesh.coords(r))) for r in _row(i, mesh.expert_size)])
        for i in range(mesh.edp)
    ]
    views = [
        (f"Dense: dp {mesh.dp} x tp {mesh.tp}", dense),
        (f"Experts: edp {mesh.edp} x ep {mesh.ep} x etp {mesh.etp}", expert),
    ]
    return '<div class="views">' + "".join(_view(*view) for view in views) + "</div>"


def _row(i: int, width: int) -> range:
    return range(i * width, (i + 1) * width)


def _view(title: str, rows: list[tuple[str, list[tuple[int, str]]]]) -> str:
    """Chips row by row, as many as fit a page."""
    left = MOST_CHIPS
    parts = [f"<div><h3>{title}</h3>"]
    for at, (axis, cells) in enumerate(rows):
        if left <= 0:
            parts.append(f'<p class="small soft">and {plural(len(rows) - at, "row")} more</p>')
            break
        shown = cells[: max(left, 4)]
        chips = "".join(f'<span class="chip"><b>{r}</b><i>{word}</i></span>' for r, word in shown)
        if len(shown) < len(cells):
            chips += f'<span class="chip more">{len(cells) - len(shown):,} more</span>'
        left -= len(shown)
        parts.append(
            f'<div class="chiprow"><span class="axis">{axis}</span>'
            f'<div class="chips">{chips}</div></div>'
        )
    return "".join(parts) + "</div>"


def memory_bars(explained: Explained) -> str:
    """A bar for each set of ranks alike, all to one scale; hatched is what is estimated."""
    longest = max(alike.memory.total for alike in explained.alike)
    hatch = (
        '<svg aria-hidden="true" style="position:absolute;width:0;height:0"><defs>'
        '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><line class="hatch" x1="0" y1="0" x2="0" y2="6"/>'
        "</pattern></defs></svg>"
    )
    bars = "".join(_bar(alike, longest) for alike in explained.alike)
    return f'{hatch}<div class="memory">{bars}</div>'


def _bar(alike: Alike, longest: int) -> str:
    memory = alike.memory
    name = named(alike.ranks)
    at, parts, items = 0.0, [], []
    for field, word, exact in MEMORY:
        nbytes = getattr(memory, field)
        width = 100 * nbytes / longest
        fill = 'fill="url(#hatch)"' if exact == "estimated" else f'class="{field}"'
        parts.append(f'<rect x="{at:.3f}%" width="{width:.3f}%" height="30" {fill}/>')
        items.append(
            f'<div><dt><span class="swatch {field}"></span>{word}</dt>'
            f"<dd>{data(nbytes)}<i>{exact}</i></dd></div>"
        )
        at += width
    described = ", ".join(f"{w} {size(getattr(memory, f))}" for f, w, _ in MEMORY)
    return (
        f'<div><div class="head"><b>{escape(name)}</b><span>{data(memory.total)} '
        '<span class="soft">in all</span></span></div>'
        f'<svg role="img"><title>Memory of {escape(name)}</title><desc>{described}</desc>'
        f'<rect class="bar" width="100%" height="30"/>{"".join(parts)}</svg>'
        f'<dl class="items">{"".join(items)}</dl></div>'
    )


def fullest_moment(memory: Memory) -> str:
    return max(memory.moments, key=lambda name: memory.moments[name])
