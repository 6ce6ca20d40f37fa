"""What each rank runs: a script, a module, or tpx's own text generation, under shim.py."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LaunchError, PlanError, nearest, or_list
from .options import Options

SHIM = Path(__file__).with_name("shim.py")
GENERATE = "tpx.generate"
PROMPT, MAX_TOKENS = "The", 128  # where the command line names none
# Options that only text generation reads, by field; a script has its own.
TEXT_OPTIONS = (
    "prompt", "chat", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "dtype",
    "context", "batch", "memory_fraction",
)  # fmt: skip
SAMPLING = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
            "top_k": "top_k", "seed": "seed"}  # fmt: skip
ENGINE = "context", "batch", "memory_fraction"


class Command(NamedTuple):
    """kind: "script" or "module"; name: its path or name."""

    kind: str
    name: str
    args: tuple[str, ...]

    @property
    def generates(self) -> bool:
        return (self.kind, self.name) == ("module", GENERATE)

    def argv(self) -> list[str]:
        """What follows the interpreter's name; `$` is doubled, since elastic fills templates."""
        words = [str(SHIM), str(os.getpid()), self.kind, self.name, *self.args]
        return [word.replace("$", "$$") for word in words]


class Generation(NamedTuple):
    """What generate.py is told. sampling: arguments of SamplingParams; engine: of LLM, for its
    engine's sizes."""

    prompts: list[str]
    chat: bool
    dtype: str | None
    sampling: dict[str, Any]
    engine: dict[str, Any]


def command(options: Options) -> Command:
    """Raises LaunchError where the script or module is missing, PlanError on a wrong word."""
    if options.target is None:
        return Command("module", GENERATE, (json.dumps(generation(options)._asdict()),))
    refuse_text_options(options, options.target)
    if options.module:
        check_module(options.target)
        return Command("module", options.target, options.args)
    check_script(options.target)
    return Command("script", options.target, options.args)


def generation(options: Options) -> Generation:
    given = {name: getattr(options, field) for field, name in SAMPLING.items()}
    sampling = {name: value for name, value in given.items() if value is not None}
    sampling.setdefault("max_tokens", MAX_TOKENS)
    prompts = list(options.prompt) or [PROMPT]
    return Generation(prompts, options.chat, options.dtype, sampling, engine_of(options))


def engine_of(options: Options) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ENGINE}
    return {name: value for name, value in given.items() if value is not None}


def refuse_text_options(options: Options, target: str) -> None:
    default = Options()
    for field in TEXT_OPTIONS:
        if getattr(options, field) != getattr(default, field):
            flag = f"--{field.replace('_', '-')}"
            raise PlanError(
                f"`{flag}` is for text generation, and `{target}` is run instead",
                f"put the script's own arguments after it, or leave out `{flag}`",
            )


def check_script(target: str) -> None:
    path = Path(target)
    if path.is_file():
        return
    if path.suffix == ".py":
        raise LaunchError(f"script `{target}` does not exist", hint_for(path))
    if path.is_dir():
        raise LaunchError(f"`{target}` is a folder, not a script", "name a file in it")
    raise PlanError(f"`{target}` is neither a script nor a recipe", hint_for(path))


def hint_for(path: Path) -> str:
    """The scripts beside it whose names are near."""
    folder = path.parent
    scripts = {p.name: p for p in sorted(folder.glob("*.py"))} if folder.is_dir() else {}
    names = {**{p.stem: p for p in scripts.values()}, **scripts}
    close = dict.fromkeys(str(names[name]) for name in nearest(path.name, names))
    return f"did you mean {or_list(close)}?" if close else "give the path of a Python file"


def check_module(name: str) -> None:
    """Looks a module up as `python -m` would, from the current folder, without importing any."""
    path: list[str] | None = [os.getcwd(), *sys.path]
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        full = ".".join(parts[:end])
        spec = importlib.machinery.PathFinder.find_spec(full, path)
        if spec is None:
            if end == 1 and any(finder.find_spec(full, None) for finder in sys.meta_path):
                return  # built in, or an editable install's own finder
            raise LaunchError(
                f"there is no module `{full}` here",
                "`-m` takes a name such as `package.module`; a file is given without `-m`",
            )
        path = list(spec.submodule_search_locations or [])
