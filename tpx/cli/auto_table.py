"""Draws what `tpx plan auto` found on 80 columns, or turns it into JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..mesh import AXES, GROUPS, Mesh
from ..plan.auto import Candidate, Search
from ..plan.cuts import cuts_of
from ..plan.device import Device
from ..plan.links import Links
from ..plan.reason import ms, ranks, sequences, short_mesh, unit, variant
from ..plan.topology import span_of
from ..plan.wants import Work
from .plan_words import size

SHOWN = 10  # meshes of the table
WIDTH = 80


def draw(found: Search, proofs: int, console: Any) -> None:
    model, work = found.model, found.work

    def say(text: str = "") -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(f"{model.spec.model_type} on {ranks(work.world)} ({work.topology}) of {work.device.name}")
    say(f"{work.phase}, {sequences(work)} in all{_limit(work)}")
    say()
    _draw_table(found, say)
    best = found.fit[0]
    say()
    _draw_memory(best, say)
    if work.topology.nodes > 1:
        say()
        _draw_groups(best.mesh, work.links, say)
    say()
    for line in notes(found):
        say(line)
    tried = len(found.fit) + len(found.big)
    say(f"{tried:,} candidates on {_meshes(found)} meshes, {len(found.big):,} too big; "
        f"the first passes {proofs} proofs")  # fmt: skip


def _draw_table(found: Search, say: Callable[..., None]) -> None:
    """Times in one unit; where they are not known, what decides instead."""
    first = found.fit[0].cost
    scale, name = (1e6, "us") if first and first.seconds < 1e-4 else (1e3, "ms")
    heads = (name, "weights", "compute", "KV", "links") if first else ("B/token", "links ms")
    width = 8 if first else 10
    head = "".join(f"{word:>{width}}" for word in heads)
    say(f"   {'mesh':<25}{head}{'a rank' if first else 'weights+KV':>12}")
    shown = found.best_of_each_mesh()
    for place, one in enumerate(shown[:SHOWN], 1):
        held = one.memory.total if first else sum(one.memory[:2])
        row = "".join(f"{figure:>{width}}" for figure in _figures(one, scale))
        say(f"{place:>2} {short_mesh(one.mesh):<25}{row}{size(held):>12}")
        more = variant(one, found.model.layout)
        if more:
            say(f"      {more}")
    if len(shown) > SHOWN:
        say(f"    ... and {len(shown) - SHOWN:,} meshes more")


def _figures(one: Candidate, scale: float) -> list[str]:
    cost = one.cost
    if cost is None:
        return [f"{one.traffic:,.0f}", _short(scale * one.links)]
    return [
        _short(scale * part)
        for part in (cost.seconds, cost.weights, cost.compute, cost.kv, cost.links)
    ]


def _short(value: float) -> str:
    """Four digits that count, in at most seven characters."""
    if value >= 1000:
        return f"{value:.0f}"
    return "0" if value == 0 else f"{value:.4g}" if value >= 0.01 else "<0.01"


def _draw_memory(one: Candidate, say: Callable[..., None]) -> None:
    say(f"the fullest rank of {short_mesh(one.mesh)}")
    for name, nbytes, kind in held(one):
        say(f"    {name:<26}{size(nbytes):>12}  {kind}")


def held(one: Candidate) -> list[tuple[str, int, str]]:
    memory = one.memory
    return [
        ("weights", memory.weights, "exact"),
        ("KV cache", memory.kv, "exact"),
        ("buffers", memory.buffers, "estimated"),
    ]


def _draw_groups(mesh: Mesh, links: Links, say: Callable[..., None]) -> None:
    """Which groups cross nodes, and how fast a rank sends in them."""
    say(f"    {'group':<10}{'ranks':>7}{'nodes':>7}{'on a node':>11}{'GB/s a rank':>13}  stated")
    for group in GROUPS:
        span = span_of(mesh, group, links.topology)
        if span.ranks > 1 and group != "world":
            link = "network" if span.crosses else "inside the node"
            speed = f"{links.speed(span) / 1e9:.4g}"
            say(f"    {group:<10}{span.ranks:>7}{span.nodes:>7}{span.per_node:>11}{speed:>13}"
                f"  {link}")  # fmt: skip


def notes(found: Search) -> list[str]:
    """What is known, what is guessed, and how far off it may be."""
    best, work = found.fit[0], found.work
    lines = [work.links.note, *_stated(found)] if work.links.note else []
    if best.cost is None:
        return [*lines, f"the speed of {work.device.name} is not known: ranked by memory, then by "
                "traffic (bytes a layer)"]  # fmt: skip
    cost = best.cost
    lines.append(
        "structure is fact, speed is an estimate: the first may take "
        f"{ms(cost.low)} to {ms(cost.high)} {unit(work)}"
    )
    second = next((one for one in found.best_of_each_mesh() if one.mesh != best.mesh), None)
    if second is not None and second.cost is not None and second.cost.low < cost.high:
        close = sum(
            one.cost is not None and one.cost.seconds < 1.1 * cost.seconds
            for one in found.best_of_each_mesh()[1:]
        )
        if close:
            lines.append(f"{close} other mesh{'es' * (close > 1)} within 10%: measure before you "
                         "rely on the order")  # fmt: skip
    if work.batch < best.mesh.dp:
        lines.append(f"{sequences(work)}: {best.mesh.dp - work.batch} of {best.mesh.dp} dp groups "
                     "have none")  # fmt: skip
    return lines


def _stated(found: Search) -> list[str]:
    """Which collectives of the best plan a measured table does not tell about."""
    best, links, model = found.fit[0], found.work.links, found.model
    if links.table is None:
        return []
    missing = set()
    for name in best.dispatch:
        cuts = cuts_of(model.layout, best.cut, best.mesh, best.mesh.coords(0))
        for step in model.collectives(model.spec, best.mesh, cuts, name):
            span = span_of(best.mesh, step.group, links.topology)
            if not links.time(step.op, span, step.nbytes).measured:
                missing.add(f"{step.op} of {span.ranks} ranks")
    return [f"stated, since not measured: {', '.join(sorted(missing))}"] if missing else []


def _limit(work: Work) -> str:
    return "" if work.memory is None else f", {size(work.memory)} a rank"


def _meshes(found: Search) -> int:
    return len({one.mesh for one in (*found.fit, *found.big)})


def as_json(found: Search) -> dict[str, Any]:
    """All of `draw`, for programs; every mesh, its best plan first."""
    work = found.work
    return {
        "model": found.model.spec.model_type,
        "world": work.world,
        "topology": str(work.topology),
        "device": work.device.name,
        "figures": figures(work.device),
        "phase": work.phase,
        "context": work.context,
        "batch": work.batch,
        "memory": work.memory,
        "links": {"measured": work.links.table is not None, "note": work.links.note},
        "ranked_by": "memory" if found.fit[0].cost is None else "time",
        "candidates": [_candidate(one, found) for one in found.best_of_each_mesh()],
        "fit": len(found.fit),
        "too_big": len(found.big),
    }


def figures(device: Device) -> dict[str, Any]:
    return {name: figure._asdict() for name, figure in device.figures().items()}


def _candidate(one: Candidate, found: Search) -> dict[str, Any]:
    cost = None if one.cost is None else {"seconds": one.cost.seconds, **one.cost._asdict()}
    return {
        "mesh": {axis: getattr(one.mesh, axis) for axis in AXES},
        "whole": variant(one, found.model.layout),
        "dispatch": one.dispatch._asdict(),
        "seconds": cost,
        "bytes": {**one.memory._asdict(), "exact": ["weights", "kv"], "estimated": ["buffers"]},
        "links": one.links,
        "traffic": one.traffic,
    }
