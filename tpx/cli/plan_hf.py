"""`tpx plan import-hf` and `tpx plan export-hf`: between a plan and Hugging Face's form."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..config import read_config
from ..errors import PlanError
from ..families import family_of
from ..hub import find_model
from ..plan.find import read_plan
from ..plan.hf import from_hf
from ..plan.hf_export import to_hf
from ..plan.hf_form import DISPATCH, HfForm, form_of_config, read_form
from ..plan.presharded import open_index
from ..plan.proofs import prove
from ..plan.write import to_yaml

COMMANDS = ("import-hf", "export-hf")


def add_parser(commands: Any) -> None:
    importer = commands.add_parser("import-hf", help="a plan from Hugging Face's dicts")
    importer.add_argument("file", nargs="?", metavar="FILE.json",
                          help="a tp_plan, a DistributedConfig or a config.json "
                          "(default: the model's config.json)")  # fmt: skip
    importer.add_argument("--world", type=int, metavar="N", help="ranks (default: its tp_size)")
    importer.add_argument("--out", metavar="F", help="write the plan there")
    exporter = commands.add_parser("export-hf", help="a plan as Hugging Face's dicts")
    exporter.add_argument("plan", metavar="PLAN", help="a plan's name or a YAML file")
    exporter.add_argument("--json", action="store_true", help="print JSON, not Python")
    for command in (importer, exporter):
        command.add_argument("--model", required=True, metavar="PATH|ID",
                             help="a folder or a Hugging Face id")  # fmt: skip
        command.add_argument("--revision", metavar="NAME", help="of a Hugging Face id")


def run(args: argparse.Namespace) -> int:
    """-> 0; whatever is wrong is raised."""
    text, notes = (import_hf if args.plan_command == "import-hf" else export_hf)(args)
    out = getattr(args, "out", None)
    if out is None:
        print(text, end="")
    else:
        write(Path(out), text)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def import_hf(args: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    """The plan as YAML, proved for the model, and what was noted on the way."""
    folder = find_model(args.model, args.revision)
    config = read_config(folder)
    family = family_of(config)
    spec = family.spec(config)
    layout = family.layout(spec)
    name = args.file or str(folder / "config.json")
    form = read_form(Path(args.file)) if args.file else form_of_config(config, name)
    world = world_of(args.world, form, name)
    ep_plan = {} if form.ep_size == 1 and world > 1 else form.ep_plan
    dispatch = DISPATCH[form.ep_implementation]
    plan, notes = from_hf(form.tp_plan, layout, family.model_type, world, ep_plan, dispatch)
    if ep_plan != form.ep_plan:
        notes = (*notes, "`ep_plan` is left out, as it is there: `ep_size` is 1")
    prove(plan, spec, layout, open_index(folder, config), world, family)
    return to_yaml(plan, "\n".join((f"imported from {name}", *notes))), notes


def world_of(given: int | None, form: HfForm, name: str) -> int:
    if given is not None and given < 1:
        raise PlanError(f"`--world` is `{given}`", "give the number of ranks, 1 or more")
    said = form.tp_size or form.ep_size
    if given is None and said is None:
        raise PlanError(f"`{name}` does not say for how many ranks it is", "add `--world 2`")
    if given is not None and said is not None and given != said:
        raise PlanError(
            f"`--world {given}` is not what `{name}` says: {said} ranks", "leave out `--world`"
        )
    return given or said or 1


def export_hf(args: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    folder = find_model(args.model, args.revision)
    config = read_config(folder)
    family = family_of(config)
    spec = family.spec(config)
    layout = family.layout(spec)
    plan = read_plan(args.plan, family.model_type)
    form, notes = to_hf(plan, layout)
    prove(plan, spec, layout, open_index(folder, config), plan.mesh.world, family)
    return (json.dumps(form.as_dict(), indent=2) + "\n" if args.json else form.as_code()), notes


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise PlanError(
            f"file `{path}` cannot be written: {error.strerror}", "give another one: `--out FILE`"
        ) from error
