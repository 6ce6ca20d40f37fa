"""Reads `tpx generate`'s command line: flags of `tpx launch`, and its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from ..errors import PlanError
from ..launch.options import Options
from ..launch.recipe import is_recipe
from .flags import FLAGS, Flag, all_flags, from_recipe, take
from .launch import help_table

PROGRAM = "tpx generate"
USAGE = "tpx generate --model PATH|ID --input FILE --output FILE [FLAGS] [RECIPE]"
NEEDED = {
    "input": 'a file with a request a line, such as `{"prompt": "The"}`',
    "output": "a file for the results, a line each",
}


def flags_of_launch(*names: str) -> tuple[Flag, ...]:
    known = all_flags()
    return tuple(known[f"--{name}"] for name in names)


GROUPS: dict[str, tuple[Flag, ...]] = {
    "Files": (
        Flag(
            "--input", "FILE", "a request a line: prompt or messages, and what SamplingParams has"
        ),
        Flag("--output", "FILE", "a result a line; what is in it is not done again"),
        Flag("--restart", "", "throw away what is in it", None),
    ),
    "Where a request does not say": flags_of_launch(
        "chat", "max-new-tokens", "temperature", "top-p", "top-k", "seed"
    ),
    "Model": (
        *FLAGS["Model"],
        *flags_of_launch("dtype", "context", "batch", "memory-fraction"),
    ),
    "Ranks of this machine": FLAGS["Ranks"],
    "Checks": flags_of_launch("preflight"),
}


class Asked(NamedTuple):
    """source, target: the files, as they were named."""

    source: str
    target: str
    restart: bool
    options: Options


def parse(argv: Sequence[str]) -> Asked | None:
    """None: help was asked for. Raises PlanError."""
    flags = [*(flag for group in GROUPS.values() for flag in group), *flags_of_launch("nnodes")]
    known = {name: flag for flag in flags for name in (flag.name, *flag.also)}
    recipe: dict[str, Any] = {}
    found: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return None
        if not recipe and is_recipe(word):
            recipe = from_recipe(word, known, PROGRAM)
        elif word.startswith("-"):
            take(word, rest, known, found, PROGRAM)
        else:
            raise PlanError(f"`{PROGRAM}` takes no argument `{word}`", f"type `{USAGE}`")
    for name, what in NEEDED.items():
        if name not in found:
            raise PlanError(f"`{PROGRAM}` needs `--{name} FILE`", what)
    own = {name: found.pop(name, False) for name in ("input", "output", "restart")}
    options = Options(**recipe | found)
    if options.nnodes != "1":
        raise PlanError(
            f"`{PROGRAM}` runs on one machine, and `{options.nnodes}` are asked for",
            "run it on each of them, with a part of the requests and an `--output` of its own",
        )
    return Asked(own["input"], own["output"], own["restart"], options)


def typed(field: str, value: Any) -> str:
    """How an option is given."""
    flag = f"--{field.replace('_', '-')}"
    if value is None or value is False:
        return f"no `{flag}`"
    return f"`{flag}`" if value is True else f"`{flag} {value}`"


def print_help() -> None:
    console = Console(highlight=False)
    console.print(Text(f"Usage: {USAGE}\n"))
    console.print(
        "Continues the requests of a file on several ranks. A run that was stopped goes\n"
        "on where it stood, with the same command."
    )
    for title, flags in GROUPS.items():
        console.print(Text(f"\n{title}", style="bold"))
        console.print(help_table(flags))
