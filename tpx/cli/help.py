"""Help of commands that argparse reads, in the form of `tpx launch --help`, on 80 columns."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 80
TITLES = {"positional arguments": "Arguments", "options": "Flags"}
Row = tuple[str, str]


def print_help(parser: argparse.ArgumentParser, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    width = min(console.width, WIDTH)
    console.print(Text.assemble("Usage: ", (usage(parser), "bold")), width=width)
    if parser.description:
        console.print(f"\n{parser.description}", width=width, markup=False)
    for title, rows in sections(parser):
        console.print(Text(f"\n{title}", style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows:
            table.add_row(Text(f"  {name}", style="cyan"), Text(text))
        console.print(table, width=width)
    if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
        console.print(f"\n`{parser.prog} COMMAND --help` says more.", markup=False)


def usage(parser: argparse.ArgumentParser) -> str:
    """Arguments, required flags, and `[FLAGS]` where there are others."""
    words = [parser.prog]
    positional = [action for action in parser._actions if not action.option_strings]
    words += [str(action.metavar or action.dest.upper()) for action in positional]
    flags = [
        action for action in parser._actions if action.option_strings and action.dest != "help"
    ]
    words += [_spelt(action) for action in flags if action.required]
    words += ["[FLAGS]"] * any(not action.required for action in flags)
    return " ".join(words)


def sections(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[Row]]]:
    """Title, and names with what they are, of each group that is not empty."""
    for group in parser._action_groups:
        rows = [row for action in group._group_actions for row in _rows(action)]
        commands = any(isinstance(a, argparse._SubParsersAction) for a in group._group_actions)
        title = "Commands" if commands else TITLES.get(str(group.title), str(group.title))
        if rows:
            yield title, rows


def _rows(action: argparse.Action) -> list[Row]:
    if isinstance(action, argparse._SubParsersAction):
        return [(choice.dest, choice.help or "") for choice in action._choices_actions]
    if action.dest == "help" or action.help == argparse.SUPPRESS:
        return []
    return [(_spelt(action), action.help or "")]


def _spelt(action: argparse.Action) -> str:
    """`--world N`, or the name of an argument."""
    metavar = action.metavar or action.dest.upper()
    if not action.option_strings:
        return str(metavar)
    name = action.option_strings[-1]
    if action.choices and not action.metavar:
        metavar = "|".join(map(str, action.choices))
    return name if action.nargs == 0 else f"{name} {metavar}"
