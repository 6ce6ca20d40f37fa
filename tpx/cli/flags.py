"""Reads `tpx launch`'s own command line: its flags end where the script begins.

A flag's name may be written with dashes or underscores, its value after a blank or after `=`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import PlanError, nearest, or_list
from ..hub import DOWNLOADS
from ..launch.checks import MODES
from ..launch.command import MAX_TOKENS, PROMPT
from ..launch.options import (
    Options,
    kernels,
    nnodes,
    nproc,
    number,
    port,
    rdzv_conf,
    text,
    whole,
    words,
)  # fmt: skip
from ..launch.recipe import find_recipe, is_recipe
from ..plan.device import DEVICES

Reader = Callable[[str, str], Any]


class Flag(NamedTuple):
    """read: from text; None: a switch. also: torchrun's names. metavar "" keeps it off the help."""

    name: str
    metavar: str
    help: str
    read: Reader | None = text
    also: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


FLAGS: dict[str, tuple[Flag, ...]] = {
    "Ranks": (
        Flag("--nproc", "N|auto", "ranks on this machine: one a GPU, or two on CPU", nproc,
             ("--nproc-per-node",)),
        Flag("--device", "cpu|cuda", "default: cuda where a GPU is visible",
             words(*dict.fromkeys(("cpu", "cuda", *DEVICES)))),
        Flag("--max-restarts", "N", "start all ranks again after a failure", whole(0)),
        Flag("--run-dir", "DIR", "records of the run (default: runs/<time>)"),
        Flag("--traceback", "", "show every frame of an error, of every rank", None),
        Flag("--prefix", "HOW", "ranks before their lines: auto (terminal), always, never",
             words("auto", "always", "never")),
        Flag("--hang-timeout", "S", "seconds without progress that end a job (120; 0: never)",
             whole(0)),
        Flag("--shutdown-timeout", "S", "seconds to end after a signal or a failure (default: 3)",
             whole(0)),
    ),
    "Checks": (
        Flag("--preflight", "HOW", "strict (default), warn: start in spite of faults, or off",
             words(*MODES)),
        Flag("--dry-run", "", "say what would start, and where; start nothing", None),
        Flag("--world", "N", "with --dry-run --device h100|h200|cpu: ranks elsewhere", whole(1)),
    ),
    "Model": (
        Flag("--model", "PATH|ID", "a folder or a Hugging Face id; a script sees TPX_MODEL"),
        Flag("--tp-plan", "PLAN", "auto, a plan's name or a YAML file; TPX_TP_PLAN"),
        Flag("--revision", "NAME", "of a Hugging Face id (default: the commit fetched before)"),
        Flag("--download", "HOW", "of an id: partial (what ranks here read), full, or auto",
             words(*DOWNLOADS)),
        Flag("--kernels", "HOW", "true (default), local, hub, off, or attention=OWNER/NAME@1",
             kernels),
    ),
    "Text, without a script": (
        Flag("--prompt", "TEXT", f"what to continue (default: {PROMPT}); may be given again"),
        Flag("--chat", "", "put the prompt through the checkpoint's chat template", None),
        Flag("--max-new-tokens", "N", f"tokens to write (default: {MAX_TOKENS})", whole(1)),
        Flag("--temperature", "T", "0 is greedy (default)", number),
        Flag("--top-p", "P", "draw from the likeliest tokens that reach P", number),
        Flag("--top-k", "K", "draw from the K likeliest tokens", whole(0)),
        Flag("--seed", "N", "the same seed draws the same text", whole(0)),
        Flag("--dtype", "auto|float32", "default: the checkpoint's", words("auto", "float32")),
        Flag("--context", "N", "tokens that a text can have, prompt included", whole(1)),
        Flag("--batch", "N", "texts that are written at once", whole(1)),
        Flag("--memory-fraction", "F", "of a GPU's memory, for all of it (default: 0.9)",
             number),
    ),
    "Several machines, as torchrun has them": (
        Flag("--nnodes", "N", "machines", nnodes),
        Flag("--node-rank", "N", "this machine's number", whole(0)),
        Flag("--master-addr", "HOST", "address of machine 0"),
        Flag("--master-port", "PORT", "default: a free one; 29500 with --master-addr", port),
        Flag("--rdzv-backend", "NAME", "static or c10d",
             words("static", "c10d", "etcd", "etcd-v2")),
        Flag("--rdzv-endpoint", "HOST:PORT", "where the machines meet", also=("--rdzv",)),
        Flag("--rdzv-id", "ID", "the job's name there"),
        Flag("--rdzv-conf", "K=V,...", "more settings of the backend", rdzv_conf),
        Flag("--local-addr", "HOST", "this machine's address"),
        Flag("--standalone", "", "one machine, a free port (default)", None),
        Flag("--slurm", "", "all of these from the variables of a Slurm step", None),
    ),
}  # fmt: skip


def all_flags() -> dict[str, Flag]:
    """By every spelling, with dashes."""
    flags = [flag for group in FLAGS.values() for flag in group]
    return {name: flag for flag in flags for name in (flag.name, *flag.also)}


def parse(argv: Sequence[str]) -> Options | None:
    """None: help was asked for. Raises PlanError on a wrong flag or value, or a wrong recipe."""
    known = all_flags()
    recipe: dict[str, Any] = {}
    found: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not recipe and is_recipe(word):
            recipe = from_recipe(word, known)
        elif word in ("-h", "--help"):
            return None
        elif word in ("-m", "--module"):
            if not rest:
                raise PlanError("`-m` needs a module", "`tpx launch -m MODULE`")
            found |= {"target": rest[0], "module": True, "args": tuple(rest[1:])}
            break
        elif word in ("--", "-") or not word.startswith("-"):
            script = rest if word == "--" else [word, *rest]
            if script:
                found |= {"target": script[0], "args": tuple(script[1:])}
            break
        else:
            take(word, rest, known, found)
    return Options(**recipe | found)


def from_recipe(name: str, known: dict[str, Flag], program: str = "tpx launch") -> dict[str, Any]:
    """The options that a recipe gives. Raises PlanError."""
    recipe = find_recipe(name)
    found: dict[str, Any] = {}
    for flag, value in recipe.flags().items():
        switch = f"--{flag}" in known and known[f"--{flag}"].read is None and value == "true"
        try:
            take(f"--{flag}" if switch else f"--{flag}={value}", [], known, found, program)
        except PlanError as error:
            raise PlanError(f"recipe `{name}`: {error.message}", error.hint) from None
    named = {"recipe": name, "hardware": recipe.device}
    return found | named | {"environment": tuple(recipe.environment.items())}


def take(
    word: str,
    rest: list[str],
    known: dict[str, Flag],
    found: dict[str, Any],
    program: str = "tpx launch",
) -> None:
    """Reads the flag `word`, and its value from `rest` where it is not behind `=`."""
    spelt, equals, value = word.partition("=")
    flag = known.get(spelt.replace("_", "-"))
    if flag is None:
        raise PlanError(f"`{program}` has no flag `{spelt}`", hint_for(spelt, known, program))
    if flag.read is None:
        if equals:
            raise PlanError(f"`{spelt}` takes no value", f"write `{spelt}`")
        found[flag.field] = True
        return
    if not equals:
        if not rest:
            raise PlanError(f"`{spelt}` needs a value", f"write `{spelt} {flag.metavar}`")
        value = rest.pop(0)
    read = flag.read(spelt, value)
    found[flag.field] = (*found.get("prompt", ()), read) if flag.field == "prompt" else read


def hint_for(spelt: str, known: dict[str, Flag], program: str) -> str:
    close = nearest(spelt.replace("_", "-"), known)
    return f"did you mean {or_list(close)}?" if close else f"`{program} --help` lists them"
