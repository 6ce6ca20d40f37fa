"""`tpx plan explain --io`: the spans of files that the ranks of a node read, and their bytes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..plan.once import most_of
from ..plan.prepare import Prepared
from ..plan.reading import FileReads, NodeReads, RankReads, read_node
from ..plan.spans import GAP, Span
from ..plan.topology import NODE, read_topology, topology_for
from .plan_auto import choose_device
from .plan_table import DOTS
from .plan_words import named, size

WIDEST = 42  # a parameter's name
ENDS = 5  # spans drawn at each end of a long list


def find(prepared: Prepared, args: argparse.Namespace) -> NodeReads:
    """The node of `--rank`, else the first. Raises PlanError."""
    told = read_topology(args.topology) if args.topology else None
    topology = topology_for(prepared.world, told, NODE)
    node = (args.rank or 0) // topology.gpus
    return read_node(prepared, node, choose_device(args.device), topology)


def draw(found: NodeReads, rank: int | None, console: Console) -> None:
    """rank: whose spans are drawn one by one; None: nobody's."""
    ranks = found.ranks if rank is None else [each for each in found.ranks if each.rank == rank]
    _draw_files(ranks, console)
    if rank is not None:
        _draw_spans(ranks[0].spans, console)
    _draw_totals(found, ranks, console)
    _draw_choice(found, console)


def _draw_files(ranks: Sequence[RankReads], console: Console) -> None:
    console.print(
        f"\n[bold]reads of files[/bold]  runs at most {GAP >> 10} KiB apart are read as one"
    )
    titles = ("spans", "bytes", "smallest", "largest", "dropped")
    console.print(f"[dim]{'':26}{titles[0]:>7}{''.join(f'{t:>11}' for t in titles[1:])}[/dim]")
    of: dict[str, dict[FileReads, list[int]]] = {}
    for each in ranks:
        for file in each.files:
            of.setdefault(file.file, {}).setdefault(file, []).append(each.rank)
    for name, alike in sorted(of.items()):
        console.print(f"      {name}", markup=False, soft_wrap=True)
        shown = sorted(alike.items(), key=lambda each: -each[0].nbytes)
        for file, same in shown if len(shown) <= 2 else (shown[0], shown[-1]):
            which = named(same) if len(shown) <= 2 else f"rank {same[0]}"
            if len(shown) > 2:
                which += ", the most" if file is shown[0][0] else ", the least"
            sizes = "".join(f"{size(n):>11}" for n in file[2:])
            console.print(f"        {which:<18}{file.spans:>7,}{sizes}")


def _draw_spans(spans: Sequence[Span], console: Console) -> None:
    console.print(f"\n[bold]spans[/bold]  {len(spans):,}, in order")
    console.print(f"[dim]{'offset':>21}{'bytes':>15}  into[/dim]")
    shown = [*spans] if len(spans) <= 2 * ENDS else [*spans[:ENDS], None, *spans[-ENDS:]]
    file = ""
    for span in shown:
        if span is None:
            console.print(f"      [dim]and {len(spans) - 2 * ENDS:,} more; `--json` has all[/dim]")
            continue
        if span.file != file:
            file = span.file
            console.print(f"      {file}", markup=False, soft_wrap=True)
        console.print(f"{span.offset:>21,}{span.nbytes:>15,}  {_into(span)}", markup=False)


def _into(span: Span) -> str:
    """Its first parameter, by the end of its name, and how many others."""
    names = list(dict.fromkeys(copy.parameter for copy in span.copies))
    more = f" and {len(names) - 1}" if len(names) > 1 else ""
    name, room = names[0].removeprefix("model."), WIDEST - len(more)
    return (name if len(name) <= room else DOTS + name[1 - room :]) + more


def _draw_totals(found: NodeReads, ranks: Sequence[RankReads], console: Console) -> None:
    console.print("\n[bold]bytes read, kept and held[/bold]")
    titles = ("read alone", "read once", "kept", "held")
    console.print(f"[dim]{'':28}{''.join(f'{title:>13}' for title in titles)}[/dim]")
    alike: dict[str, list[int]] = {}
    for each in ranks:
        alike.setdefault(_row(each[1:5]), []).append(each.rank)
    for row, same in alike.items():
        console.print(f"      {named(same):<22}{row}")
    sums = _sums(found)
    name = f"node {found.node} of {found.nodes}" if found.nodes > 1 else "the node"
    console.print(f"      {name:<22}{_row(sums)}")
    shares = "".join(f"{f'{n / sums[2]:.2f}x':>13}" for n in sums[:2])
    console.print(f"      {'of what is kept':<22}{shares}")
    console.print("      [dim]kept as the checkpoint stores it; held as the model runs[/dim]")


def _row(sums: Sequence[int]) -> str:
    return "".join(f"{size(nbytes):>13}" for nbytes in sums)


def _sums(found: NodeReads) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*(r[1:5] for r in found.ranks), strict=True))


def _draw_choice(found: NodeReads, console: Console) -> None:
    device, choice = found.device, found.plan.choice
    if found.plan.bytes_alone == found.plan.bytes_once:
        console.print("\nnothing to share: no two ranks of the node need the same bytes")
        return
    alone, once = (f"{seconds:.2g} s" for seconds in (choice.alone, choice.once))
    console.print(f"\n[bold]{_chosen(choice.shared)}[/bold], on {device.name}, estimated:")
    console.print(f"      {alone:>8}  if each rank reads for itself")
    console.print(
        f"      {once:>8}  if each byte is read once and sent, {size(most_of(device))} at a time"
    )
    for what, figure in (("a rank reads", device.files), ("a rank sends", device.intra)):
        said = f"{what} {size(figure.value)}/s: {figure.source}"
        for line in wrap(said, 72, subsequent_indent="  "):
            console.print(f"      [dim]{escape(line)}[/dim]")


def _chosen(shared: bool) -> str:
    return "each byte is read once a node" if shared else "each rank reads for itself"


def as_json(found: NodeReads, rank: int | None) -> dict[str, Any]:
    """Bytes everywhere. `ranks`: of the node; the spans of `rank`, if one is named."""
    sums = dict(zip(("alone", "once", "kept", "held"), _sums(found), strict=True))
    choice = found.plan.choice
    return {
        "node": found.node,
        "nodes": found.nodes,
        "device": found.device.name,
        "gap": GAP,
        "shared": choice.shared,
        "seconds": {"alone": choice.alone, "once": choice.once},
        "bytes": sums | {"read": sum(found.plan.bytes_read)},
        "amplification": sum(found.plan.bytes_read) / sums["kept"],
        "ranks": [_rank(each, rank) for each in found.ranks if rank in (None, each.rank)],
    }


def _rank(each: RankReads, rank: int | None) -> dict[str, Any]:
    said = each._asdict() | {"files": [file._asdict() for file in each.files]}
    spans = said.pop("spans")
    if rank is not None:
        copies = ({"copies": [copy._asdict() for copy in span.copies]} for span in spans)
        said["spans"] = [s._asdict() | c for s, c in zip(spans, copies, strict=True)]
    return said
