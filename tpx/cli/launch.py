"""`tpx launch`: reads the command line, checks all that can be checked, and starts the ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.console import Console

from ..launch.checks import warnings
from ..launch.command import generation
from ..launch.options import Options
from ..launch.preflight import Job, preflight
from ..launch.recipe import shipped_recipes
from ..launch.roll_call import call_of, differ, differences, roll_call
from ..launch.supervise import supervise
from ..params import SamplingParams
from .flags import FLAGS, Flag, parse
from .topology import topology_lines

if TYPE_CHECKING:
    from rich.table import Table

USAGE = "tpx launch [FLAGS] [RECIPE] [SCRIPT | -m MODULE] [ARGS...]"


def run(argv: Sequence[str]) -> int:
    """-> the exit code. Raises TpxError for everything that is wrong before a rank starts."""
    options = parse(argv)
    if options is None:
        print_help()
        return 0
    if options.target is None:
        check_sampling(options)
    job = preflight(options)
    if options.dry_run:
        from .dry_run import draw  # no run pays for it

        return draw(job, options.recipe, Console(highlight=False))
    for line in before_the_start(job):
        print(line, file=sys.stderr, flush=True)
    if options.preflight != "off":
        meet(job, options.preflight)
    ending = supervise(job, options)
    if ending.text:
        print(ending.text, file=sys.stderr)
    return ending.exit_code


def before_the_start(job: Job) -> Iterator[str]:
    yield from warnings(job.survey.checks)
    if job.note:
        yield job.note
    if job.model.prepared is not None:
        yield from topology_lines(job.survey.groups, job.model.prepared.plan.mesh)


def meet(job: Job, mode: str) -> None:
    """On several machines: waits until all have come, and compares them. Raises LaunchError."""
    call = call_of(job)
    if call is None:
        return
    found = differences(roll_call(call, lambda line: print(line, file=sys.stderr, flush=True)))
    if found and mode == "strict":
        raise differ(found)
    for line in found:
        print(f"warning: the machines differ: {line}", file=sys.stderr, flush=True)


def check_sampling(options: Options) -> None:
    """Raises RequestError here rather than in every rank."""
    SamplingParams(**generation(options).sampling)


def print_help() -> None:
    from rich.text import Text  # no run pays for it

    console = Console(highlight=False)
    console.print(f"Usage: [bold]{USAGE.replace('[', chr(92) + '[')}[/bold]\n")
    console.print(
        "Runs a script on several ranks, as torchrun does, once devices, model and\n"
        "plan have been checked. Without a script the ranks generate text."
    )
    for title, flags in FLAGS.items():
        console.print(Text(f"\n{title}", style="bold"))
        console.print(help_table(flags))
    console.print("\n" + "\n".join(wrap(f"Recipes: {', '.join(shipped_recipes())}", 78)))
    console.print(
        "\nExit codes: 2 usage or plan, 3 checkpoint or machine, 4 a rank raised, 5 a\n"
        "rank was killed, 6 hang, 7 rendezvous, 70 a bug in tpx, 130 Ctrl-C. A script's\n"
        "own sys.exit(n) passes through."
    )


def help_table(flags: Sequence[Flag]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for flag in flags:
        table.add_row(Text(f"  {flag.name} {flag.metavar}", style="cyan"), Text(flag.help))
    return table
