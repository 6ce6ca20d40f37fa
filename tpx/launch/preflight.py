"""Everything that can be known before a rank starts: devices, model and plan, files, port.

Needs no torch. What passes here is a Job, and elastic.py starts it as it stands.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import LaunchError, PlanError
from ..hub import AUTO, HEADERS
from ..kernels import read_wanted
from .command import Command, command
from .devices import count_gpus
from .options import Options
from .rendezvous import Rendezvous, node_range, rendezvous

if TYPE_CHECKING:
    from ..plan.prepare import Prepared
    from ..plan.wants import Wants

RANKS_ON_CPU = 2
TEXT_SHUTDOWN = (
    3  # seconds that ranks have to end after a signal: generated text has nothing to save
)
SCRIPT_SHUTDOWN = 30  # torch's own


class Job(NamedTuple):
    """nproc: ranks of this machine. environment: what they see on top of this process's."""

    command: Command
    nproc: int
    device: str
    nodes: tuple[int, int]
    rendezvous: Rendezvous
    environment: dict[str, str]
    run_dir: Path
    max_restarts: int
    shutdown_timeout: int
    note: str = ""  # a line for the user: why `auto` chose this plan


class Model(NamedTuple):
    """What TPX_MODEL and TPX_TP_PLAN shall say; prepared: the checks, where there was enough."""

    name: str | None
    tp_plan: str | None
    prepared: Prepared | None


def preflight(options: Options, environ: Mapping[str, str] | None = None) -> Job:
    """Raises PlanError, CheckpointError or LaunchError, before anything is written."""
    environ = os.environ if environ is None else environ
    refuse_nesting(environ)
    read_wanted(environ.get("TPX_KERNELS") or None, "TPX_KERNELS")
    to_run = command(options)
    device, nproc = devices(options, environ)
    nodes = node_range(options.nnodes)
    meeting = rendezvous(options)
    model = check_model(options, to_run, environ, device, nproc, nodes)
    if model.prepared is not None and options.download != HEADERS:
        here = ranks_here(options, meeting, nproc, nodes[1])
        model = model._replace(prepared=fetch(model.prepared, here, options.download))
    run_dir = make_run_dir(options.run_dir or environ.get("TPX_RUN_DIR"))
    shutdown = options.shutdown_timeout
    if shutdown is None:
        shutdown = TEXT_SHUTDOWN if to_run.generates else SCRIPT_SHUTDOWN
    return Job(
        command=to_run,
        nproc=nproc,
        device=device,
        nodes=nodes,
        rendezvous=meeting,
        environment=environment(model, device, nproc, run_dir, environ, options.kernels),
        run_dir=run_dir,
        max_restarts=options.max_restarts,
        shutdown_timeout=shutdown,
        note=note_of(model, run_dir),
    )


def refuse_nesting(environ: Mapping[str, str]) -> None:
    if "RANK" in environ:
        raise LaunchError(
            f"`tpx launch` was started by another launcher: `RANK` is `{environ['RANK']}`",
            "under torchrun run the script itself, `tpx.LLM` works there; elsewhere `unset RANK`",
        )


def devices(options: Options, environ: Mapping[str, str]) -> tuple[str, int]:
    """-> "cuda" or "cpu", and the number of ranks."""
    gpus = 0 if options.device == "cpu" else count_gpus(environ)
    if gpus == 0 and (options.device == "cuda" or options.nproc == "gpu"):
        flag = "--device cuda" if options.device == "cuda" else "--nproc gpu"
        raise LaunchError(f"`{flag}` needs a GPU, and none is visible", gpu_hint(environ))
    if options.nproc in ("auto", "gpu"):
        return ("cuda", gpus) if gpus else ("cpu", RANKS_ON_CPU)
    nproc = int(options.nproc)
    if not gpus:
        return "cpu", nproc
    if nproc > gpus:
        raise LaunchError(
            f"{nproc} ranks need {nproc} GPUs, and {gpus} {'is' if gpus == 1 else 'are'} visible",
            f"use `--device cpu`, or `--nproc {gpus}`",
        )
    return "cuda", nproc


def gpu_hint(environ: Mapping[str, str]) -> str:
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return "use `--device cpu`"
    return f"use `--device cpu`, or change `CUDA_VISIBLE_DEVICES`, which is `{listed}`"


def check_model(
    options: Options,
    to_run: Command,
    environ: Mapping[str, str],
    device: str,
    nproc: int,
    nodes: tuple[int, int],
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
    if nodes[0] != nodes[1]:
        raise PlanError(
            f"`--nnodes {options.nnodes}` leaves open how many ranks the plan is for",
            "give one number of nodes",
        )
    from ..plan.prepare import prepare  # a script without a plan does not pay for it

    def checked(world: int, wants: Wants | None = None) -> Prepared:
        return prepare(name, tp_plan, world, options.revision, wants, options.download or AUTO)

    if tp_plan != "auto":
        return Model(name, tp_plan, checked(nproc * nodes[1]))
    from .wants import wants_here

    batch = max(1, len(options.prompt)) if to_run.generates else None
    wants = wants_here(device, nodes[1], nproc, batch, environ)
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


def ranks_here(options: Options, meeting: Rendezvous, nproc: int, nodes: int) -> range:
    """Of this machine; none where the machines number themselves when they meet, so that the ranks
    fetch for themselves."""
    if nodes > 1 and meeting.backend != "static":
        return range(0)
    return range(options.node_rank * nproc, (options.node_rank + 1) * nproc)


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


def make_run_dir(given: str | None) -> Path:
    """The run's folder, made now; records of an earlier run in it are removed."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run_dir = Path(given).absolute() if given else Path("runs", name).absolute()
    try:
        for part in ("errors", "progress", "elastic"):
            shutil.rmtree(run_dir / part, ignore_errors=True)
            (run_dir / part).mkdir(parents=True)
    except OSError as error:
        raise LaunchError(
            f"the run's folder `{run_dir}` cannot be written ({error.strerror})",
            "give another one: `--run-dir DIR`",
        ) from None
    return run_dir


def environment(
    model: Model,
    device: str,
    nproc: int,
    run_dir: Path,
    environ: Mapping[str, str],
    kernels: str | None,
) -> dict[str, str]:
    """Writes the plan that was checked, and says where it is."""
    found = {"TPX_RUN_DIR": str(run_dir)}
    if model.name:
        found["TPX_MODEL"] = model.name
    if model.tp_plan:
        found["TPX_TP_PLAN"] = model.tp_plan
    if model.prepared is not None:
        plan = run_dir / "plan.yaml"
        plan.write_text(model.prepared.plan_text())
        found["TPX_MODEL"] = str(model.prepared.folder)
        if model.tp_plan == "auto":
            found["TPX_TP_PLAN"] = str(plan)
    if kernels:
        found["TPX_KERNELS"] = kernels
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""  # so that `device=None` means what was asked for
    if "OMP_NUM_THREADS" not in environ:
        found["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    return found
