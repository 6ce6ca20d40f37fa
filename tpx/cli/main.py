"""The entry point: dispatches to a command, and turns every error into text and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any, NoReturn

from ..errors import PlanError, TpxError, did_you_mean, nearest, or_list
from ..version import __version__

COMMANDS = {
    "launch": "start ranks: a script of yours, or text generation",
    "generate": "continue the requests of a file, into a file, and go on after a stop",
    "plan": "prove, explain, compare and choose plans, without starting a rank",
    "shard": "write a checkpoint as one file a rank, cut by a plan",
    "verify": "run a plan on real ranks against one rank, and compare",
    "bench": "measure a model's speed, its load, and the links between ranks",
    "render": "write the file that Slurm, Kubernetes or SkyPilot takes",
    "doctor": "what this machine has, and which kernels run on it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """-> the exit code, see errors.EXIT_CODES."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except TpxError as error:
        return show(error.render(), error.exit_code, wants_traceback(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        drop_output()
        return 141
    except SystemExit as error:  # argparse's help, or rich that found the output closed
        closed = isinstance(error.__context__, BrokenPipeError)
        return 141 if closed else int(error.code or 0)
    except Exception as error:  # the one place: whatever it is, it is a bug
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        bug = TpxError(f"a bug in tpx: `{text}`", "run it again with `--traceback`, and report it "
                       "in tpx's issue tracker")  # fmt: skip
        return show(bug.render(), bug.exit_code, wants_traceback(argv))


def dispatch(argv: list[str]) -> int:
    argv = argv[1:] if argv[:1] == ["--traceback"] else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_help()
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"tpx {__version__}")
        return 0
    if argv[0] in ("launch", "generate", "render"):  # their flags end where a script begins
        command = import_module(f".{argv[0]}", __package__)
        return int(command.run(argv[1:]))
    if argv[0] in COMMANDS:
        command = import_module(f".{argv[0]}", __package__)
        return int(command.run(parse(command, argv)))
    kind = "flag" if argv[0].startswith("-") else "command"
    known = ("--help", "--version") if kind == "flag" else COMMANDS
    raise PlanError(f"tpx has no {kind} `{argv[0]}`", did_you_mean(argv[0], known))


class Parser(argparse.ArgumentParser):
    """argparse with tpx's errors."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def print_help(self, file: Any = None) -> None:
        from .help import print_help

        print_help(self)

    def flags(self) -> list[str]:
        """Of this parser and of its commands."""
        found = set(re.findall(r"--[\w-]+", self.format_help()))
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update(*(parser.flags() for parser in action.choices.values()))
        return sorted(found)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message)
        if wrong is None:
            raise PlanError(f"`{self.prog}`: {message}", f"see `{self.prog} --help`")
        choices = re.findall(r"[\w-]+", wrong[2])
        raise PlanError(f"`{self.prog}` knows no `{wrong[1]}`", did_you_mean(wrong[1], choices))


def parse(command: Any, argv: Sequence[str]) -> Any:
    """The arguments of a command that brings its own parser."""
    parser = Parser(prog="tpx")
    command.add_parser(parser.add_subparsers(dest="command", required=True))
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        words = " ".join(("tpx", *takewhile(lambda word: not word.startswith("-"), argv[:2])))
        close = nearest(unknown[0], parser.flags())
        hint = f"did you mean {or_list(close)}?" if close else f"see `{words} --help`"
        raise PlanError(f"`{words}` has no argument `{unknown[0]}`", hint)
    return found


def wants_traceback(argv: Sequence[str]) -> bool:
    return "--traceback" in argv


def show(text: str, code: int, with_traceback: bool) -> int:
    try:
        if with_traceback:
            traceback.print_exc()
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        drop_output()
        return 141
    return code


def drop_output() -> None:
    """Nobody reads what is written: lets the interpreter flush into nothing at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def print_help() -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print("Usage: [bold]tpx COMMAND[/bold]\n")
    console.print("Runs Mixture-of-Experts language models over many ranks, by a plan.\n")
    for name, text in COMMANDS.items():
        console.print(f"  [cyan]{name:<8}[/cyan] {text}")
    console.print("\n`tpx COMMAND --help` says more. `tpx --version` prints the version.")


if __name__ == "__main__":
    sys.exit(main())
