"""`tpx bench`: starts ranks that measure, and tells what they found."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bench.asked import Asked
from ..launch.options import Options
from ..launch.preflight import Job, preflight
from ..launch.supervise import supervise
from . import bench_asked, bench_links
from .bench_page import write_page
from .bench_table import draw, merged

Ask = Callable[[argparse.Namespace], Asked]
ASK: dict[str, Ask] = {
    "latency": bench_asked.latency,
    "throughput": bench_asked.throughput,
    "load": bench_asked.load,
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", description="Measures this machine.")
    commands = parser.add_subparsers(
        dest="bench_command", required=True, metavar="latency|throughput|load|links"
    )
    bench_asked.add_parsers(commands)
    bench_links.add_parser(commands)


def run(args: argparse.Namespace) -> int:
    """-> the ranks' exit code. Raises TpxError for everything that is wrong before one starts."""
    if args.bench_command == "links":
        return bench_links.run(args)
    asked = ASK[args.bench_command](args)
    bench_asked.check_page(args.html)
    loads = asked.bench == "load"
    found = []
    for one in each_load(asked) if loads else [asked]:
        told = measure(args, one)
        if isinstance(told, int):
            return told
        found.append(told)
    result = merged(found, asked) if loads else found[0]
    if args.html:
        write_page(args.html, result)
    print(json.dumps(result, indent=1) if args.json else "\n".join(draw(result)))
    if args.html and not args.json:
        print(f"\nwrote {args.html}")
    return 0


def each_load(asked: Asked) -> list[Asked]:
    """A process each: the ways take turns."""
    return [asked._replace(ways=[way]) for _ in range(asked.rounds) for way in asked.ways]


def measure(args: argparse.Namespace, asked: Asked) -> dict[str, Any] | int:
    """What rank 0 has written, or the exit code of ranks that failed."""
    with tempfile.TemporaryDirectory(prefix="tpx-bench-") as folder:
        file = Path(folder, "found.json")
        told = asked._replace(file=str(file))
        options = Options(
            nproc=bench_asked.ranks(args),
            device=bench_asked.device(args),
            model=args.model,
            tp_plan=args.tp_plan,
            run_dir=f"{folder}/run",
            target=f"tpx.bench.{asked.bench}",
            module=True,
            args=(told.to_json(),),
            # While a peer runs in one rank, the others wait.
            hang_timeout=0 if asked.peer else Options().hang_timeout,
            traceback=args.traceback,
        )
        job = preflight(options)
        check(job, args, asked)
        before = os.getloadavg()[0]
        ending = supervise(job, options)
        if ending.exit_code:
            print(ending.text, file=sys.stderr)
            return ending.exit_code
        found: dict[str, Any] = json.loads(file.read_text())
        found["model"]["plan"] = args.tp_plan  # the file of `auto` is gone by now
        return found | {"load_average": [before, os.getloadavg()[0]]}


def check(job: Job, args: argparse.Namespace, asked: Asked) -> None:
    """What is known once model and device are."""
    assert job.model.prepared is not None, f"{args.tp_plan=}"
    bench_asked.check_tokens(asked, job.model.prepared.spec.max_position_embeddings)
    bench_asked.check_graphs(args, job.device)
