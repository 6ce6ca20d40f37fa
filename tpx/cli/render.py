"""`tpx render`: the file that a scheduler takes, for a `tpx launch` on several machines."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..errors import PlanError, did_you_mean
from ..launch.checks import refuse
from ..launch.hardware import Hardware, on_paper
from ..launch.options import Options
from ..launch.preflight import preflight
from ..launch.recipe import is_recipe, recipe_folder
from .flags import all_flags, parse

KINDS = {
    "slurm": ("slurm.sh", "a batch script for `sbatch`"),
    "lws": ("lws.yaml", "a LeaderWorkerSet of Kubernetes, which starts again what ends"),
    "pytorchjob": ("pytorchjob.yaml", "a PyTorchJob of Kubeflow, which ends"),
    "sky": ("sky.yaml", "a task of SkyPilot"),
}
OWN = {"--out": "FILE", "--name": "NAME", "--image": "IMAGE"}
# Said by the file itself, by what the scheduler sets.
PLACING = {"nnodes", "node_rank", "master_addr", "master_port", "rdzv_endpoint", "rdzv_backend",
           "slurm", "standalone", "dry_run", "world", "nproc", "device"}  # fmt: skip
NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")


class Request(NamedTuple):
    """words: what follows `tpx launch`."""

    kind: str
    out: str | None
    name: str
    image: str
    words: list[str]


def run(argv: Sequence[str]) -> int:
    """-> 0. Raises PlanError, and what `tpx launch --dry-run` finds wrong."""
    request = read(argv)
    if request is None:
        print_help()
        return 0
    options = parse(request.words)
    if options is None:
        print_help()
        return 0
    text = render(request, options)
    if request.out is None:
        print(text, end="")
        return 0
    write(request.out, text)
    print(f"wrote {request.out}")
    return 0


def read(argv: Sequence[str]) -> Request | None:
    """None: help was asked for."""
    rest = list(argv)
    if not rest or rest[0] in ("-h", "--help"):
        return None
    kind = rest.pop(0)
    if kind not in KINDS:
        raise PlanError(f"`tpx render` knows no `{kind}`", did_you_mean(kind, KINDS))
    found: dict[str, str] = {}
    while rest and rest[0].partition("=")[0] in OWN:
        flag, equals, value = rest.pop(0).partition("=")
        if not equals and not rest:
            raise PlanError(f"`{flag}` needs a value", f"write `{flag} {OWN[flag]}`")
        found[flag] = value if equals else rest.pop(0)
    name = found.get("--name", "tpx")
    if not NAME.fullmatch(name):
        raise PlanError(f"`--name {name}` is no name of a job", "use a-z, 0-9 and `-`: `--name x1`")
    image = found.get("--image", "")
    if kind in ("lws", "pytorchjob") and not image:
        raise PlanError(f"`tpx render {kind}` needs an image", "add `--image REGISTRY/NAME:TAG`")
    return Request(kind, found.get("--out"), name, image, rest)


def render(request: Request, options: Options) -> str:
    """The file's text, once the plan has passed its proofs for these machines."""
    asked = replace(options, dry_run=True)
    hardware = on_paper(asked)
    if hardware is None:
        raise PlanError(
            "which machines the file is for is not said",
            "name a recipe, or add `--world 16 --device h100`",
        )
    if options.preflight != "off" and (options.model or options.target):
        refuse(preflight(asked).survey.checks, options.preflight)
    return fill(request, hardware)


def fill(request: Request, hardware: Hardware) -> str:
    import jinja2

    words = [f"--nproc={hardware.nproc}", f"--device={hardware.device}", *kept(request.words)]
    assert hardware.elsewhere is not None
    template = (recipe_folder() / "templates" / KINDS[request.kind][0]).read_text()
    settings: dict[str, Any] = {"trim_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, **settings)
    return environment.from_string(template).render(
        name=request.name,
        image=request.image,
        nodes=hardware.nodes[1],
        gpus=hardware.nproc if hardware.device == "cuda" else 0,
        product=hardware.elsewhere.name.upper(),
        shell=shlex.join(words),
        # Kubernetes puts a variable's value in the place of $(NAME); two dollars keep it.
        words=[json.dumps(word.replace("$(", "$$(")) for word in words],
    )


def kept(words: Sequence[str]) -> list[str]:
    """Of what was typed, all but the flags that the file says itself."""
    known, rest, found = all_flags(), list(words), list[str]()
    while rest and rest[0] not in ("-m", "--module", "--"):
        word = rest[0].partition("=")
        flag = known.get(word[0].replace("_", "-"))
        if flag is None and not is_recipe_of(word[0], found):
            break
        count = 2 if flag is not None and flag.read is not None and not word[1] else 1
        taken, rest = rest[:count], rest[count:]
        if flag is None or flag.field not in PLACING:
            found += taken
    return found + rest


def is_recipe_of(word: str, before: Sequence[str]) -> bool:
    """Whether the word is the recipe among these words."""
    return is_recipe(word) and not any(is_recipe(other) for other in before)


def write(out: str, text: str) -> None:
    try:
        Path(out).write_text(text)
    except OSError as error:
        raise PlanError(
            f"`{out}` cannot be written ({error.strerror})", "give another file: `--out FILE`"
        ) from None


def print_help() -> None:
    console = Console(highlight=False)
    usage = "tpx render KIND [--out FILE] [--name NAME] [--image IMAGE] LAUNCH..."
    console.print("Usage: ", end="")
    console.print(usage, style="bold", markup=False)
    console.print(
        "\nWrites the file that a scheduler takes. LAUNCH is what follows `tpx launch`: a\n"
        "recipe, or flags with `--world 16 --device h100`. The plan is proved first.\n"
    )
    for kind, (_, said) in KINDS.items():
        console.print(f"  [cyan]{kind:<11}[/cyan] {said}")
