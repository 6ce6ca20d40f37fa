"""The ranks that talk to each other, in a few lines before they start: `--dry-run` says it all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..launch.lines import spans
from ..launch.placement import GroupPlace
from ..mesh import Mesh

MOST_LINES, MOST_GROUPS = 4, 4


def topology_lines(groups: Sequence[GroupPlace], mesh: Mesh) -> Iterator[str]:
    """A line for each kind of group; none for one rank."""
    for number, group in enumerate(groups[:MOST_LINES]):
        title = "groups" if number == 0 else ""
        yield f"{title:<8}{group_line(group, mesh)}"
    if len(groups) > MOST_LINES:
        yield f"{'':8}and {len(groups) - MOST_LINES} kinds more: `--dry-run` shows them"


def group_line(group: GroupPlace, mesh: Mesh) -> str:
    """`tp: r0-3 | r4-7, inside a machine`."""
    ranks = mesh.groups(group.name.partition(",")[0])
    cells = " | ".join(spans(each) for each in ranks[:MOST_GROUPS])
    more = f" and {len(ranks) - MOST_GROUPS} more" if len(ranks) > MOST_GROUPS else ""
    where = f"over {group.span.nodes} machines" if group.span.crosses else "inside a machine"
    return f"{group.name}: {cells}{more}, {where}"
