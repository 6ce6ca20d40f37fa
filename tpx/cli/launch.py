"""`tpx launch`: reads the command line, checks all that can be checked, and starts the ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..launch.command import generation
from ..launch.options import Options
from ..launch.preflight import preflight
from ..launch.supervise import supervise
from ..params import SamplingParams
from .flags import FLAGS, Flag, parse

USAGE = "tpx launch [FLAGS] [SCRIPT | -m MODULE] [ARGS...]"


def run(argv: Sequence[str]) -> int:
    """-> the exit code. Raises TpxError for everything that is wrong before a rank starts."""
    options = parse(argv)
    if options is None:
        print_help()
        return 0
    if options.target is None:
        check_sampling(options)
    job = preflight(options)
    if job.note:
        print(job.note, file=sys.stderr, flush=True)
    ending = supervise(job, options.traceback)
    if ending.text:
        print(ending.text, file=sys.stderr)
    return ending.exit_code


def check_sampling(options: Options) -> None:
    """Raises RequestError here rather than in every rank."""
    SamplingParams(**generation(options).sampling)


def print_help() -> None:
    console = Console(highlight=False)
    console.print(f"Usage: [bold]{USAGE.replace('[', chr(92) + '[')}[/bold]\n")
    console.print(
        "Runs a script on several ranks, as torchrun does, once devices, model and\n"
        "plan have been checked. Without a script the ranks generate text."
    )
    for title, flags in FLAGS.items():
        console.print(Text(f"\n{title}", style="bold"))
        console.print(help_table(flags))
    console.print(
        "\nExit codes: 2 usage or plan, 3 checkpoint or machine, 4 a rank raised, 5 a\n"
        "rank was killed, 7 rendezvous, 70 a bug in tpx, 130 Ctrl-C. A script's own\n"
        "sys.exit(n) passes through."
    )


def help_table(flags: Sequence[Flag]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for flag in flags:
        table.add_row(Text(f"  {flag.name} {flag.metavar}", style="cyan"), Text(flag.help))
    return table
