"""The model and the plan of a job: proved before a rank starts, and fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import PlanError
from ..hub import AUTO
from .command import Command
from .hardware import Hardware
from .options import Options
from .rendezvous import Rendezvous

if TYPE_CHECKING:
    from ..plan.prepare import Prepared
    from ..plan.wants import Wants


class Model(NamedTuple):
    """What TPX_MODEL and TPX_TP_PLAN shall say; prepared: the checks, where there was enough."""

    name: str | None
    tp_plan: str | None
    prepared: Prepared | None


def check_model(
    options: Options, to_run: Command, environ: Mapping[str, str], hardware: Hardware
) -> Model:
    """Text generation and a named plan are checked now; a script alone may bring its own plan."""
    name = options.model or environ.get("TPX_MODEL")
    tp_plan = options.tp_plan or environ.get("TPX_TP_PLAN")
    if to_run.generates:
        tp_plan = tp_plan or "auto"
        if not name:
            raise PlanError(
                "there is no model to generate text with",
                "type `tpx launch --model FOLDER_OR_HUB_ID`, or name a script to run",
            )
    if not name or not tp_plan:
        refuse_hub_options(options)
        return Model(name, tp_plan, None)
    if hardware.nodes[0] != hardware.nodes[1]:
        raise PlanError(
            f"`--nnodes {options.nnodes}` leaves open how many ranks the plan is for",
            "give one number of nodes",
        )
    from ..plan.prepare import prepare  # a script without a plan does not pay for it

    def checked(world: int, wants: Wants | None = None) -> Prepared:
        return prepare(name, tp_plan, world, options.revision, wants, options.download or AUTO)

    if tp_plan != "auto":
        return Model(name, tp_plan, checked(hardware.world))
    from .wants import wants_for

    batch = max(1, len(options.prompt)) if to_run.generates else None
    wants = wants_for(hardware, batch, environ)
    try:
        prepared = checked(wants.world, wants)
    except PlanError:  # it may fit with a shorter context than `auto` plans for
        prepared = checked(wants.world, replace(wants, context=1, batch=1))
    return Model(name, tp_plan, prepared)


def refuse_hub_options(options: Options) -> None:
    for flag, value in (("--revision", options.revision), ("--download", options.download)):
        if value is not None:
            raise PlanError(
                f"`{flag} {value}` is for a model and a plan, and they are not both named",
                f"add `--model` and `--tp-plan`, or write `{flag[2:]}=` in the script's `tpx.LLM`",
            )


def ranks_here(options: Options, meeting: Rendezvous, hardware: Hardware) -> range:
    """Of this machine; none where the machines number themselves when they meet, so that the ranks
    fetch for themselves."""
    if hardware.nodes[1] > 1 and meeting.backend != "static":
        return range(0)
    first = options.node_rank * hardware.nproc
    return range(first, first + hardware.nproc)


def fetch(prepared: Prepared, ranks: range, download: str | None) -> Prepared:
    """All that these ranks will read is on this machine's disk; -> where."""
    from ..plan.fetch import fetched
    from .fetch_bar import fetch_bar

    with fetch_bar() as bar, fetched(prepared, ranks, download or AUTO, bar.report) as there:
        return there


def note_of(model: Model, run_dir: Path) -> str:
    """The first line of the reason that `auto` writes into its file."""
    if model.prepared is None or model.tp_plan != "auto":
        return ""
    reason = model.prepared.plan_text().partition("\n")[0].removeprefix("# ").rstrip(".")
    return f"plan: {reason[0].lower()}{reason[1:]}; {run_dir / 'plan.yaml'}"
