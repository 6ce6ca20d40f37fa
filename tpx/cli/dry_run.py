"""`tpx launch --dry-run`: what would start, where each rank would stand, and what was checked."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from textwrap import wrap

from rich.console import Console
from rich.text import Text

from ..launch.checks import Check
from ..launch.placement import GroupPlace, RankPlace
from ..launch.preflight import Job
from ..launch.rank_environment import argv, own_environment, shared_environment
from ..launch.recipe import find_recipe
from ..mesh import Mesh
from ..version import __version__
from .plan_words import plural, size

WIDTH = 80
INDENT = 24  # of what a check says
MOST_RANKS = 16  # drawn one by one; of more, those of the first machine and the last rank
ROW = 56  # characters of a picture's row, between its name and how many it leaves out
MOST_ROWS = 8  # groups of the mesh's picture
MARKS = {"ok": "green", "doubt": "yellow", "fault": "red"}


def draw(job: Job, recipe: str | None, console: Console) -> int:
    """-> the exit code: 3 where a check found a fault."""
    found = job.survey
    console.print(f"[bold]tpx {__version__}[/bold]  dry run: nothing was started or written")
    if recipe is not None:
        draw_lines("", recipe_lines(recipe), console)
    draw_lines("", heading(job), console)
    draw_lines("ranks", rank_lines(found.ranks, job.nproc), console)
    if job.model.prepared is not None:
        draw_lines("mesh", mesh_lines(job.model.prepared.plan.mesh, job.nproc), console)
        draw_lines("groups", group_lines(found.groups, found.links), console)
    draw_lines("checks", check_lines(found.checks), console)
    draw_lines("each rank runs", [shlex.join(argv(job))], console)
    draw_lines("with the environment", environment_lines(job), console)
    return 3 * any(check.state == "fault" for check in found.checks)


def draw_lines(title: str, lines: Iterable[str | Text], console: Console) -> None:
    """A line is never broken: it may be copied."""
    if title:
        console.print(f"\n[bold]{title}[/bold]")
    for line in lines:
        console.print(Text.assemble("  ", line), soft_wrap=True)


def heading(job: Job) -> Iterator[str]:
    prepared, nodes = job.model.prepared, job.nodes[1]
    if prepared is not None:
        spec = prepared.spec
        layers = f"{spec.num_hidden_layers} layers, {spec.num_local_experts} experts"
        yield f"model     {prepared.folder}: {layers}"
        yield f"plan      {prepared.plan.path}: {prepared.plan.mesh}"
    if job.note:
        yield f"          {job.note.partition(': ')[2].partition(';')[0]}"
    each = plural(job.nproc, "rank")
    where = f"one machine of {each}" if nodes == 1 else f"{nodes} machines of {each} each"
    yield f"machines  {where}, on {job.survey.product}"
    yield f"meet at   {job.rendezvous.endpoint if nodes > 1 else 'a free port of this machine'}"


def recipe_lines(recipe: str) -> Iterator[str]:
    found = find_recipe(recipe).verified
    if found is None:
        yield f"recipe    {recipe}: not run on this hardware yet"
        return
    yield f"recipe    {recipe}: run on {found.date}, {found.versions}"
    yield f"          {found.figure}"


def rank_lines(ranks: Sequence[RankPlace], nproc: int) -> Iterator[str]:
    numa = any(rank.numa is not None for rank in ranks)
    places = [rank.coords._asdict() for rank in ranks if rank.coords is not None]
    cut = {axis for place in places for axis, at in place.items() if at}
    where = f"{'rank':>5}{'machine':>9}{'GPU':>5}" + f"{'NUMA':>6}" * numa
    yield f"{where}  {'place':<30}{'weights':>11}{'left':>11}"
    for number in shown_of(len(ranks), nproc):
        if number is None:
            yield f"{'...':>5}"
            continue
        rank = ranks[number]
        gpu = "-" if rank.gpu is None else rank.gpu
        memory = f"{'-' if rank.numa is None else rank.numa:>6}" if numa else ""
        weights = size(rank.need.weights) if rank.need else "-"
        left = size(rank.left) if rank.left is not None and rank.left >= 0 else "-"
        where = f"{rank.rank:>5}{rank.node:>9}{gpu:>5}{memory}"
        yield f"{where}  {axes(rank, cut):<30}{weights:>11}{left:>11}"


def axes(rank: RankPlace, cut: set[str]) -> str:
    """`tp 1, ep 3`: on the axes that the mesh cuts."""
    if rank.coords is None:
        return ""
    return ", ".join(f"{axis} {at}" for axis, at in rank.coords._asdict().items() if axis in cut)


def mesh_lines(mesh: Mesh, nproc: int) -> Iterator[str]:
    """Both views, a row a group; `|` stands between machines."""
    yield from view(f"dense: dp {mesh.dp} x tp {mesh.tp}", "dp", mesh.tp, mesh.world, nproc)
    title = f"experts: edp {mesh.edp} x ep {mesh.ep} x etp {mesh.etp}"
    yield from view(title, "edp", mesh.expert_size, mesh.world, nproc)


def view(title: str, axis: str, width: int, world: int, nproc: int) -> Iterator[str]:
    yield title
    digits = len(str(world - 1))
    most = int(ROW // (digits + 1 + 2 / nproc))
    for row in islice(range(world // width), MOST_ROWS):
        cells: list[str] = []
        for rank in range(row * width, (row + 1) * width)[:most]:
            between = "| " if rank % nproc == 0 and cells else ""
            cells.append(f"{between}{rank:>{digits}}")
        more = f" and {width - most:,} more" if width > most else ""
        yield f"  {axis} {row:<3} {' '.join(cells)}{more}"
    if world // width > MOST_ROWS:
        yield f"  and {world // width - MOST_ROWS:,} rows more"


def group_lines(groups: Sequence[GroupPlace], links: str) -> Iterator[str]:
    for group in groups:
        span = group.span
        where = "inside a machine"
        if span.crosses:
            where = f"over {span.nodes} machines, {span.per_node} on one"
        count = f"{plural(group.groups, 'group')} of {span.ranks}"
        yield f"{count:<19}{where:<30}{group.speed / 1e9:>5.0f} GB/s  {group.name}"
    if groups:
        yield links


def check_lines(checks: Sequence[Check]) -> Iterator[Text]:
    """A line a check, and more where what it says is long."""
    for check in checks:
        said = check.said + (f"; {check.hint}" if check.hint else "")
        first, *more = wrap(said, WIDTH - INDENT) or [""]
        style = MARKS[check.state]
        yield Text.assemble((f"{check.state:<7}", style), f"{check.name:<15}{first}")
        yield from (Text(f"{'':<{INDENT - 2}}{line}") for line in more)


def environment_lines(job: Job) -> Iterator[str]:
    for name, value in shared_environment(job).items():
        yield f"{name}={value if value.startswith('<') else shlex.quote(value)}"
    world = job.nproc * job.nodes[1]
    names = own_environment(job, 0)
    yield "and of its own"
    yield "".join(f"{name:>13}" for name in names)
    for rank in shown_of(world, job.nproc):
        if rank is None:
            yield f"{'...':>13}"
            continue
        own = own_environment(job, rank)
        yield "".join(f"{own[name]:>13}" for name in names)


def shown_of(world: int, nproc: int) -> list[int | None]:
    """Ranks that are drawn; None: some are left out."""
    if world <= MOST_RANKS:
        return [*range(world)]
    return [*range(min(nproc, MOST_RANKS)), None, world - 1]
