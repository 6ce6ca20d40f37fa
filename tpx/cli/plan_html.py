"""`tpx plan explain --html`: one page of an explained plan, with pictures, complete in itself.

The numbers are those of plan_json.py, which the page carries.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template

from ..errors import PlanError
from ..plan.explain import Explained, Kind, Row
from ..plan.prepare import Prepared
from ..version import __version__
from .plan_json import as_json
from .plan_lanes import lane_chart
from .plan_pictures import data, fullest_moment, heat_map, memory_bars, mesh_views
from .plan_words import meeting, plural, sent, short, size, times

TEMPLATE = Path(__file__).with_name("plan_page.html")
ARROW = "\N{RIGHTWARDS ARROW}"
MOMENTS = {
    "attention": "attention, where the reference operation holds all scores",
    "experts": "the experts, at uniform routing",
    "head": "the head",
}


def write_page(path: str, prepared: Prepared, explained: Explained) -> None:
    """Raises PlanError where the file cannot be written."""
    text = page(prepared, explained)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"`--html {path}` cannot be written: {error.strerror}",
            "give a file in a folder that is there",
        ) from error


def page(prepared: Prepared, explained: Explained) -> str:
    parts = [
        _header(prepared, explained),
        _section(
            "What each rank holds",
            f"Bytes of weights by module. A rank reads these from the checkpoint's "
            f"{size(explained.checkpoint_bytes)}, and no other byte.",
            heat_map(explained, prepared.layout),
        ),
        _section(
            "What the ranks say to each other",
            "One forward pass, from top to bottom. A block is computed by its rank; a wire is a "
            "collective between the ranks that it joins, with the bytes that each puts in.",
            lane_chart(prepared, explained),
        ),
        _section("Where the ranks stand", _mesh_words(prepared), mesh_views(prepared.plan.mesh)),
        _section("Memory", _memory_words(prepared, explained), memory_bars(explained)),
        _section("Rules", "Every parameter has exactly one.", _rules(prepared, explained)),
        _whole(prepared, explained),
        _section("Proved", "From config.json and the headers, before anything starts.",
                 _proofs(prepared)),
        f"<footer>Written by tpx {__version__}. Plan, config and headers: "
        f'<span class="mono">{prepared.digest}</span></footer>',
    ]  # fmt: skip
    found = json.dumps(as_json(prepared, explained), indent=1).replace("<", "\\u003c")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    title = escape(f"{prepared.plan.path}: {plural(prepared.world, 'rank')}")
    return template.substitute(title=title, body="\n".join(parts), json=found)


def _section(title: str, lead: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p>{body}</section>'


def _header(prepared: Prepared, explained: Explained) -> str:
    plan, world = prepared.plan, prepared.world
    fullest = max(explained.rank_bytes)
    layers = prepared.spec.num_hidden_layers
    prefill, decode = (sent(steps, layers) for steps in (explained.prefill, explained.decode))
    there = f"over {plural(layers, 'layer')}, without logits"
    if prefill != decode:
        there = f"to prefill, {size(decode)} to decode"
    facts = sum(proof.facts for proof in prepared.proofs)
    figures = [
        ("weights on the fullest rank", data(fullest),
         f"{100 * fullest / explained.checkpoint_bytes:.1f}% of the checkpoint"),
        ("sent by a rank for a token", data(prefill), there),
        ("whole on every rank", f"{100 * explained.replicated:.2f}%", "of the weights"),
        ("proofs", f"{len(prepared.proofs)}", f"{plural(facts, 'fact')}"),
    ]  # fmt: skip
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>"
        for name, value, more in figures
    )
    mesh = f": {plan.mesh}" if world > 1 else ""
    return (
        f'<header><p class="path mono">{escape(plan.path)}</p>'
        f"<h1>{escape(Path(plan.path).stem)}</h1>"
        f'<p class="mesh">{escape(plan.model)} on {plural(world, "rank")}{mesh}</p>'
        f'<dl class="figures">{cells}</dl>{_notes(prepared)}</header>'
    )


def _notes(prepared: Prepared) -> str:
    """Why `auto` chose it, and what a dict in Hugging Face's form leaves to say."""
    lines = list(prepared.report)
    if prepared.plan.path == "auto":
        lines += [line[2:] for line in prepared.text.splitlines() if line.startswith("#")]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if lines else ""


def _mesh_words(prepared: Prepared) -> str:
    if prepared.world == 1:
        return "One rank."
    return (
        "Two views of the same ranks. In a row of the dense view all ranks see the same tokens; "
        "a row of the expert view holds every expert once."
    )


def _memory_words(prepared: Prepared, explained: Explained) -> str:
    load, mesh = explained.load, prepared.plan.mesh
    moment = fullest_moment(explained.alike[0].memory)
    return (
        f"For {plural(load.sequences(mesh), 'sequence')} of {plural(load.context, 'token')} on a "
        f"rank, in steps of {load.step(mesh):,}. Hatched is estimated: activations are fullest in "
        f"{MOMENTS[moment]}."
    )


def _rules(prepared: Prepared, explained: Explained) -> str:
    rows = "".join(_rule(row, prepared, explained) for row in explained.rows)
    heads = [("line", ""), ("module", ""), ("style", ""), ("shape on rank 0, and the odd one", "")]
    heads += [("bytes on rank 0", "right"), ("where results meet", "")]
    head = "".join(f'<th scope="col" class="{side}">{name}</th>' for name, side in heads)
    return f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _rule(row: Row, prepared: Prepared, explained: Explained) -> str:
    line = str(row.rule.line) if row.rule.line else ""
    label = ' data-label="line"' if line else ""
    meets = "<br>".join(meeting(row, explained, prepared.plan.mesh)).replace("_", "-")
    where = ' data-label="meets"' if meets else ""
    first = (
        f'<tr class="rule"><td{label}>{line}</td><td class="mono">{escape(row.rule.pattern)}</td>'
        f'<td class="style" data-label="style">{row.rule.style}</td><td></td>'
        f'<td class="right nowrap" data-label="bytes">{data(row.nbytes)}</td>'
        f"<td{where}>{meets}</td></tr>"
    )
    return first + "".join(_kind(kind, kind is row.kinds[-1]) for kind in row.kinds)


def _kind(kind: Kind, last: bool) -> str:
    copies = f"{kind.copies} x " if kind.copies > 1 else ""
    shape = times(kind.whole)
    if kind.first != kind.whole:
        shape += f" {ARROW} {times(kind.first)}"
    if kind.odd:
        shape += f"<br>rank {kind.odd[0]} {ARROW} {times(kind.odd[1])}"
    return (
        f'<tr class="kind{" last" if last else ""}"><td></td>'
        f'<td class="mono">{copies}{escape(short(kind))}</td>'
        f'<td data-label="dtype">{kind.dtype}</td>'
        f'<td class="shape" data-label="shape"><span>{shape}</span></td>'
        f'<td class="right nowrap" data-label="bytes">{data(kind.nbytes)}</td><td></td></tr>'
    )


def _whole(prepared: Prepared, explained: Explained) -> str:
    if prepared.world == 1:
        return ""
    rows = "".join(
        f'<tr><td class="mono">{escape(whole.name)}</td>'
        f'<td class="right nowrap" data-label="bytes">{data(whole.nbytes)}</td>'
        f'<td data-label="why"><span>{_code(whole.advice)}</span></td></tr>'
        for whole in explained.whole
    )
    head = '<th scope="col">module</th><th scope="col" class="right">bytes</th><th></th>'
    table = f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    lead = f"{100 * explained.replicated:.2f}% of the weights lie on every rank alike."
    return _section("Whole on every rank", lead, table)


def _code(text: str) -> str:
    """Words in backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _proofs(prepared: Prepared) -> str:
    items = "".join(
        f'<li><span class="tick" aria-hidden="true">&#10003;</span>'
        f'<span class="label">{proof.name}</span><span>{_code(proof.text)}'
        f"<i>{', '.join(proof.codes)}</i></span>"
        f'<span class="facts">{proof.facts:,}</span></li>'
        for proof in prepared.proofs
    )
    return f'<ol class="proofs">{items}</ol>'
