"""Says in words why `auto` chose a plan: for people, and as the comment of the plan's own file."""

from __future__ import annotations

from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..index import CheckpointIndex
from ..mesh import AXES, Mesh
from .auto import Candidate, Search, plan_of, search as find_best
from .cost import Collectives, Cost, Model
from .load import parse_plan
from .types import Plan
from .wants import Wants, Work
from .write import to_yaml


def auto_plan(
    spec: ModelSpec,
    layout: Layout,
    index: CheckpointIndex,
    wants: Wants,
    collectives: Collectives,
) -> tuple[Plan, str]:
    """-> (the plan, its YAML text with the reason as a comment).

    Raises PlanError where no plan fits the world or the memory, saying why.
    """
    model = Model.of(spec, layout, index, collectives)
    text = text_of(find_best(model, wants))
    return parse_plan(text, "auto"), text


def text_of(search: Search) -> str:
    """The winner as YAML, with the reason at its head."""
    model = search.model
    plan = plan_of(search.fit[0], model.spec, model.layout)
    return to_yaml(plan, "\n".join(reason(search)))


def reason(search: Search) -> list[str]:
    best, work = search.fit[0], search.work
    aim = "memory" if best.cost is None else f"time on {work.device.name}"
    lines = [
        f"Chosen for {ranks(work.world)} by {aim}: {best.mesh}.",
        f"The fullest rank holds {gb(best.memory.weights)} of weights and "
        f"{gb(best.memory.kv)} of KV cache",
        f"(at {sequences(work)} in all).",
    ]
    if best.cost is not None:
        lines.append(f"{ms(best.cost.seconds)} {unit(work)}, an estimate: {parts(best.cost)}.")
    other = next((one for one in search.best_of_each_mesh() if one.mesh != best.mesh), None)
    if other is not None:
        count = len({one.mesh for one in search.fit})
        lines.append(f"Next of {count} that fit: {other.mesh}, {_more(best, other)}.")
    return lines


def _more(best: Candidate, other: Candidate) -> str:
    if best.cost is not None and other.cost is not None:
        return f"{ms(other.cost.seconds - best.cost.seconds)} more"
    more = sum(other.memory[:2]) - sum(best.memory[:2])
    return f"{gb(more)} more" if more >= 1e6 else "as many bytes, but more traffic or axes"


def ranks(world: int) -> str:
    return f"{world:,} rank{'s' * (world > 1)}"


def sequences(work: Work) -> str:
    many, long = work.batch > 1, work.context > 1
    return f"{work.batch:,} sequence{'s' * many} of {work.context:,} token{'s' * long}"


def unit(work: Work) -> str:
    return "a prompt token" if work.phase == "prefill" else "a token"


def gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3f} GB"


def ms(seconds: float) -> str:
    """Three digits that count."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"


def parts(cost: Cost) -> str:
    named = {"weights": cost.weights, "compute": cost.compute, "KV": cost.kv, "links": cost.links}
    return ", ".join(f"{name} {ms(value)}" for name, value in named.items())


def short_mesh(mesh: Mesh) -> str:
    """`tp4-edp2-ep2`: every axis that is not 1."""
    axes = (f"{axis}{getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)
    return "-".join(axes) or "tp1"


def variant(one: Candidate, layout: Layout) -> str:
    """What differs from the plain plan of its mesh: dimensions that tp leaves whole, dispatch."""
    whole = [
        dim.name for dim in layout.dims.values()
        if dim.axis == "tp" and dim.name not in one.cut and one.mesh.tp > 1
    ]  # fmt: skip
    words = []
    if "Q" in whole:
        words.append("attention whole")
    tables = [name for name in whole if layout.dims[name].table]
    words += [f"{_table(name, layout)} whole" for name in tables]
    if one.word != "auto":
        words.append(f"dispatch {one.word}")
    return ", ".join(words)


def _table(name: str, layout: Layout) -> str:
    """The module that holds this table first."""
    for parameter in layout.parameters.values():
        if any(dim.logical == name for dim in parameter.dims):
            return parameter.name.removesuffix(".weight").rpartition(".")[2]
    raise AssertionError(f"{name=} is in no parameter")
