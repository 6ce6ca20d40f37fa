"""The lane chart: one layer in time, from top to bottom, a lane a rank, as HTML and SVG.

Blocks are computation, wires are collectives: a wire joins the ranks of one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from ..families.steps import Collective
from ..mesh import Mesh
from ..plan.explain import Cuts, Explained
from ..plan.prepare import Prepared
from .plan_words import over

MOST_LANES = 8
TALL = 30  # pixels of a strip
# Collectives that bring tokens to their experts; all other ones of `moe.` come after.
TO_EXPERTS = {"tokens", "ids", "weights", "counts"} | {
    f"gather_{word}" for word in ("tokens", "ids", "weights")
}
MARKS = {"all_reduce": "adds", "all_gather": "joins", "reduce_scatter": "adds, keeps a part"}
MARKS |= {"all_to_all": "sends each its own"}


class Work(NamedTuple):
    """Computation in each lane. said: what each lane's text counts."""

    name: str
    said: str
    lanes: tuple[str, ...]


def lane_chart(prepared: Prepared, explained: Explained) -> str:
    """Prefill and decode side by side, or once where they are alike."""
    mesh, lanes = prepared.plan.mesh, range(min(prepared.world, MOST_LANES))
    cuts = {rank: alike.cuts for alike in explained.alike for rank in alike.ranks}
    phases = {
        f"Prefill: {explained.dispatch.prefill}": explained.prefill,
        f"Decode: {explained.dispatch.decode}": explained.decode,
    }
    if explained.prefill == explained.decode:
        phases = {f"Prefill and decode: {explained.dispatch.prefill}": explained.prefill}
    parts = []
    for title, steps in phases.items():
        strips = "".join(_strips(prepared, steps, [cuts[rank] for rank in lanes]))
        heads = "".join(f"<span>{rank}</span>" for rank in lanes)
        parts.append(
            f'<div class="phase"><h3>{title.replace("_", "-")}</h3>'
            f'<div class="strip"><div class="name soft">rank</div>'
            f'<div class="cells heads" style="--n:{len(lanes)}">{heads}</div></div>{strips}</div>'
        )
    two = " two" if len(phases) > 1 else ""
    note = ""
    if prepared.world > MOST_LANES:
        note = (
            f'<p class="small soft">Ranks 0 to {MOST_LANES - 1} of {mesh.world:,}; a dashed wire '
            "goes on to ranks that are not drawn.</p>"
        )
    ops = dict.fromkeys(s.op for steps in phases.values() for s in steps)
    charts = f'<div class="phases{two}">{"".join(parts)}</div>'
    return f'<div class="lanes">{charts}{_legend(ops)}{note}</div>'


def _strips(prepared: Prepared, steps: Sequence[Collective], lanes: list[Cuts]) -> Iterator[str]:
    layer = [step for step in steps if step.per_layer]
    arriving = [step for step in layer if step.name.rpartition(".")[2] in TO_EXPERTS]
    attention = [step for step in layer if not step.name.startswith("moe.")]
    returning = [step for step in layer if step not in (*arriving, *attention)]
    before = [step for step in steps if not step.per_layer and step.name != "head"]
    after = [step for step in steps if step.name == "head"]
    yield from _part("before the first layer", before, prepared, lanes)
    yield f'<div class="part">each of {prepared.spec.num_hidden_layers} layers</div>'
    spec = prepared.spec
    yield _work(Work("attention", "query and KV heads", tuple(map(_heads, lanes))))
    yield from (_wires(prepared.plan.mesh, step, len(lanes)) for step in attention)
    top = (f"top {spec.num_experts_per_tok}",) * len(lanes)
    yield _work(Work("router", f"of {spec.num_local_experts} experts, on every rank", top))
    yield from (_wires(prepared.plan.mesh, step, len(lanes)) for step in arriving)
    yield _work(Work("experts", "how many x how wide", tuple(map(_experts, lanes))))
    yield from (_wires(prepared.plan.mesh, step, len(lanes)) for step in returning)
    yield from _part("after the last layer", after, prepared, lanes)


def _part(
    title: str, steps: Sequence[Collective], prepared: Prepared, lanes: list[Cuts]
) -> Iterator[str]:
    if steps:
        yield f'<div class="part">{title}</div>'
        yield from (_wires(prepared.plan.mesh, step, len(lanes)) for step in steps)


def _heads(cuts: Cuts) -> str:
    return f"{cuts['Q'].size} + {cuts['KV'].size}"


def _experts(cuts: Cuts) -> str:
    return f"{cuts['E'].size} x {cuts['I'].size}"


def _work(work: Work) -> str:
    """Narrow lanes have what stands behind `x` on a second line."""
    n = len(work.lanes)
    lanes = [text.replace(" x", "\nx") if n > MOST_LANES // 2 else text for text in work.lanes]
    tall = TALL + 12 * any("\n" in text for text in lanes)
    boxes = "".join(
        f'<rect class="compute" x="{100 * (i + 0.06) / n:.3f}%" y="3" width="{88 / n:.3f}%" '
        f'height="{tall - 6}" rx="4"/>{_text(text, f"{100 * (i + 0.5) / n:.3f}%", tall / 2)}'
        for i, text in enumerate(lanes)
    )
    name = f'<b>{work.name}</b> <span class="soft">{work.said}</span>'
    return _strip(name, f"{work.name}: {', '.join(work.lanes)}", boxes, n, tall)


def _text(text: str, x: str, y: float) -> str:
    lines = text.split("\n")
    top = y - 6.5 * (len(lines) - 1)
    return "".join(
        f'<text class="worktext" x="{x}" y="{top + 13 * i:g}">{line}</text>'
        for i, line in enumerate(lines)
    )


def _wires(mesh: Mesh, step: Collective, n: int) -> str:
    """One wire a group; groups that cross each other get lines of their own."""
    groups = list(dict.fromkeys(mesh.group(step.group, rank) for rank in range(n)))
    rows: list[list[tuple[int, ...]]] = []
    for group in groups:
        row = next((row for row in rows if min(row[-1][-1], n - 1) < group[0]), None)
        if row is None:
            rows.append(row := [])
        row.append(group)
    gap = 15 if len(rows) < 4 else 9  # between wires that would lie on each other
    tall = TALL + gap * (len(rows) - 1)
    parts = [
        _wire(step.op, group, TALL / 2 + gap * at, n)
        for at, row in enumerate(rows)
        for group in row
    ]
    token = "a row of logits" if step.name == "head" else "a token"
    nbytes = f"{step.nbytes:,.0f} bytes {token if step.per_token else 'in all'}"
    name = (
        f"<b>{escape(step.name)}</b> {step.op.replace('_', '-')}<br>"
        f'<span class="soft">{over(step, mesh)} &middot; '
        f'<data value="{step.nbytes}">{nbytes}</data></span>'
    )
    said = "; ".join(", ".join(map(str, group[:MOST_LANES])) for group in groups)
    return _strip(name, f"{step.op} of {step.name} between ranks {said}", "".join(parts), n, tall)


def _wire(op: str, group: tuple[int, ...], y: float, n: int) -> str:
    inside = [rank for rank in group if rank < n]
    first, last = _x(inside[0], n), _x(inside[-1], n)
    parts = [f'<line class="wire" x1="{first}" x2="{last}" y1="{y:g}" y2="{y:g}"/>']
    if len(inside) < len(group):
        parts.append(f'<line class="wire cut" x1="{last}" x2="100%" y1="{y:g}" y2="{y:g}"/>')
    return "".join([*parts, *(mark(op, _x(rank, n), y) for rank in inside)])


def _x(rank: int, n: int) -> str:
    return f"{100 * (rank + 0.5) / n:.3f}%"


def mark(op: str, x: str, y: float) -> str:
    """A shape for each operation: disc, ring, square, open square."""
    open_ = " open" if op in ("all_gather", "all_to_all") else ""
    if op in ("all_reduce", "all_gather"):
        return f'<circle class="mark{open_}" cx="{x}" cy="{y:g}" r="4.5"/>'
    box = f'x="{x}" y="{y - 4:g}" width="8" height="8" transform="translate(-4 0)"'
    return f'<rect class="mark{open_}" {box}/>'


def _strip(name: str, title: str, drawing: str, n: int, tall: int) -> str:
    svg = f'<svg role="img" height="{tall}"><title>{escape(title)}</title>{drawing}</svg>'
    track = f'<div class="track" style="--n:{n}">{svg}</div>'
    return f'<div class="strip"><div class="name">{name}</div>{track}</div>'


def _legend(ops: Sequence[str] | dict[str, None]) -> str:
    spans = [
        '<span><svg width="26" height="12" aria-hidden="true"><line class="wire" x1="2" x2="24" '
        f'y1="6" y2="6"/>{mark(op, "13", 6)}</svg> {op.replace("_", "-")}: {MARKS[op]}</span>'
        for op in ops
    ]
    return f'<div class="legend">{"".join(spans)}</div>'
