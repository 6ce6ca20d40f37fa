"""`tpx plan auto`: searches every plan for a model and a number of ranks, and writes the best."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..launch.devices import smallest_gpu
from ..launch.links_file import find_links
from ..launch.options import whole, words
from ..plan.device import DEVICES, Device, device_of, find_device
from ..plan.topology import read_topology, topology_for
from ..plan.wants import PHASES, Wants, check_world, read_memory

if TYPE_CHECKING:
    from ..plan.auto import Search
    from ..plan.why import Verdict

ON_PAPER = "h100"  # what is planned for where no GPU is visible and none is named


def add_parser(commands: Any) -> None:
    said = "search every plan, and write the best one with the reason"
    parser = commands.add_parser("auto", help=said, description=f"{said}.".capitalize())
    add = parser.add_argument
    add("--model", required=True, metavar="PATH|ID", help="a folder or a Hugging Face id")
    add("--revision", metavar="NAME", help="of a Hugging Face id")
    add("--world", required=True, type=int, metavar="N", help="ranks")
    add("--memory", metavar="SIZE", help="of a rank, such as 80GiB (default: the device's)")
    add("--phase", metavar="PHASE", default="balanced",
        help="decode, prefill or balanced: 8 prompt tokens a token written (default)")  # fmt: skip
    add("--context", metavar="C", help="tokens of a sequence (default: at most 8,192)")
    add("--batch", metavar="B", help="sequences of the whole job (default: one a rank)")
    add("--device", metavar="NAME",
        help=f"{', '.join(DEVICES)} (default: the GPU here, else {ON_PAPER})")  # fmt: skip
    add("--topology", metavar="NxG[,...]", help="nodes x GPUs, such as 2x8,intra=360,inter=40 GB/s")
    add("--links", metavar="FILE", help="a table that `tpx bench links --out FILE` wrote")
    add("--why-not", metavar="WHAT", help="tp=4, or dispatch=gather, or a plan: what refused it")
    add("--out", metavar="FILE", help="write the plan there (default: to the output)")
    add("--json", action="store_true", help="print values, not a table")


def run(args: argparse.Namespace) -> int:
    """-> 0. The table goes to stderr where the plan itself is the output."""
    from rich.console import Console

    from ..config import read_config
    from ..families import family_of
    from ..hub import find_model
    from ..plan.auto import search
    from ..plan.cost import Model
    from ..plan.load import parse_plan
    from ..plan.presharded import open_index
    from ..plan.proofs import prove
    from ..plan.reason import text_of
    from ..plan.why import why_not

    wants = read_wants(args)
    folder = find_model(args.model, args.revision)
    family = family_of(read_config(folder))
    spec = family.spec(read_config(folder))
    layout, index = family.layout(spec), open_index(folder, read_config(folder))
    found = search(Model.of(spec, layout, index, family.collectives), wants)
    text = text_of(found)
    proofs = prove(parse_plan(text, "auto"), spec, layout, index, args.world, family)
    why = why_not(found, index, args.why_not) if args.why_not else None
    if args.out and not args.why_not:
        write(args.out, text)
    if args.json:
        print(json.dumps(as_json(found, text, why), indent=2))
        return 0
    here = sys.stdout if why or args.out else sys.stderr
    console = Console(file=here, highlight=False, soft_wrap=False)
    draw(found, why, len(proofs), console)
    if why is None and args.out:
        console.print(f"\nwrote {args.out}", markup=False)
    elif why is None:
        console.print()
        print(text, end="")
    return 0


def read_wants(args: argparse.Namespace) -> Wants:
    """Raises PlanError for a wrong value."""
    check_world(args.world)
    phase = words(*PHASES)("--phase", args.phase)
    memory = read_memory(args.memory) if args.memory else None
    context, batch = (
        None if text is None else whole(1)(flag, text)
        for flag, text in (("--context", args.context), ("--batch", args.batch))
    )
    told = read_topology(args.topology) if args.topology else None
    device = choose_device(args.device)
    nodes_of = args.world if device.backend == "gloo" else 8
    topology = topology_for(args.world, told, nodes_of)
    if memory is None and device.memory is not None:
        memory = int(device.memory.value)
    links = find_links(device, topology, args.links)
    return Wants(args.world, memory, phase, context, batch, links)  # type: ignore[arg-type]


def choose_device(word: str | None) -> Device:
    """As named, else the GPU that is here, else one on paper."""
    if word is not None:
        return find_device(word)
    gpu = smallest_gpu()
    return DEVICES[ON_PAPER] if gpu is None else device_of(gpu.name, gpu.memory)


def write(out: str, text: str) -> None:
    try:
        Path(out).write_text(text)
    except OSError as error:
        raise PlanError(
            f"`{out}` cannot be written ({error.strerror})", "give another file: `--out FILE`"
        ) from None


def draw(found: Search, why: Verdict | None, proofs: int, console: Any) -> None:
    from . import auto_table

    if why is not None:
        for line in why.lines:
            console.print(line, markup=False, soft_wrap=True)
        return
    auto_table.draw(found, proofs, console)


def as_json(found: Search, text: str, why: Verdict | None) -> dict[str, Any]:
    from . import auto_table

    data = auto_table.as_json(found)
    data["plan"] = text
    if why is not None:
        data["why_not"] = {"kind": why.kind, "lines": why.lines}
    return data
