"""Everything that can be known before a rank starts: devices, model and plan, files, port, memory.

Needs no torch. What passes here is a Job, and elastic.py starts it as it stands.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import LaunchError
from ..hub import HEADERS
from ..kernels import read_wanted
from .checks import refuse
from .command import Command, command
from .devices import count_gpus
from .hardware import Hardware, check_gpus_asked, on_paper
from .model import Model, check_model, fetch, note_of, ranks_here
from .options import Options
from .rendezvous import Rendezvous, meeting_elsewhere, node_range, rendezvous
from .slurm import from_slurm
from .survey import Survey, survey, write_survey

RANKS_ON_CPU = 2


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
    survey: Survey
    model: Model
    node_rank: int = 0
    note: str = ""  # a line for the user: why `auto` chose this plan


def preflight(options: Options, environ: Mapping[str, str] | None = None) -> Job:
    """Raises PlanError, CheckpointError or LaunchError, before anything is written. Nothing is
    written at all, and nothing fetched but headers, where the options ask for a dry run."""
    environ = os.environ if environ is None else environ
    refuse_nesting(environ)
    read_wanted(environ.get("TPX_KERNELS") or None, "TPX_KERNELS")
    if options.slurm:
        options = from_slurm(options, environ)
    paper = on_paper(options)
    to_run = command(options)
    hardware = paper or this_hardware(options, environ)
    meeting = meeting_elsewhere(options, paper.nodes[1]) if paper else rendezvous(options)
    model = check_model(options, to_run, environ, hardware)
    here = ranks_here(options, meeting, hardware)
    found = survey(options, environ, hardware, meeting, model, here)
    if not options.dry_run:
        refuse(found.checks, options.preflight)
        if model.prepared is not None and options.download != HEADERS:
            model = model._replace(prepared=fetch(model.prepared, here, options.download))
    run_dir = name_run_dir(options.run_dir or environ.get("TPX_RUN_DIR"), machine(options, meeting))
    job = Job(
        command=to_run,
        nproc=hardware.nproc,
        device=hardware.device,
        nodes=hardware.nodes,
        rendezvous=meeting,
        environment=environment(options, model, hardware, run_dir, environ),
        run_dir=run_dir,
        max_restarts=options.max_restarts,
        shutdown_timeout=options.shutdown_timeout,
        survey=found,
        model=model,
        node_rank=options.node_rank,
        note=note_of(model, run_dir),
    )
    if not options.dry_run:
        write(job)
    return job


def refuse_nesting(environ: Mapping[str, str]) -> None:
    if "RANK" in environ:
        raise LaunchError(
            f"`tpx launch` was started by another launcher: `RANK` is `{environ['RANK']}`",
            "under torchrun run the script itself, `tpx.LLM` works there; elsewhere `unset RANK`",
        )


def this_hardware(options: Options, environ: Mapping[str, str]) -> Hardware:
    """Of this machine, and as many ranks on each other one."""
    device, nproc = devices(options, environ)
    return Hardware(device, nproc, node_range(options.nnodes))


def devices(options: Options, environ: Mapping[str, str]) -> tuple[str, int]:
    """-> "cuda" or "cpu", and the number of ranks."""
    on_cpu = "cpu" in (options.device, options.device or options.hardware)
    gpus = 0 if on_cpu else count_gpus(environ)
    check_gpus_asked(options, gpus, environ.get("CUDA_VISIBLE_DEVICES"))
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


def machine(options: Options, meeting: Rendezvous) -> str:
    """The name of this machine's part of the run's folder, which all may share; "" for one."""
    if node_range(options.nnodes)[1] == 1:
        return ""
    static = meeting.backend == "static"
    return f"machine{options.node_rank}" if static else socket.gethostname()


def name_run_dir(given: str | None, part: str) -> Path:
    """part: of a folder that is given; a name that is made up is another one on each machine."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return (Path(given, part) if given else Path("runs", name)).absolute()


def write(job: Job) -> None:
    """Makes the run's folder, with the plan and what was checked; records of an earlier run in it
    are removed."""
    run_dir = job.run_dir
    try:
        for part in ("errors", "progress"):
            shutil.rmtree(run_dir / part, ignore_errors=True)
            (run_dir / part).mkdir(parents=True)
        write_survey(job.survey, run_dir)
        if job.model.prepared is not None:
            (run_dir / "plan.yaml").write_text(job.model.prepared.plan_text())
    except OSError as error:
        raise LaunchError(
            f"the run's folder `{run_dir}` cannot be written ({error.strerror})",
            "give another one: `--run-dir DIR`",
        ) from None


def environment(
    options: Options,
    model: Model,
    hardware: Hardware,
    run_dir: Path,
    environ: Mapping[str, str],
) -> dict[str, str]:
    """What the ranks see of tpx; a recipe's variables give way to those that are set."""
    found = {name: value for name, value in options.environment if name not in environ}
    found["TPX_RUN_DIR"] = str(run_dir)
    if model.name:
        found["TPX_MODEL"] = model.name
    if model.tp_plan:
        found["TPX_TP_PLAN"] = model.tp_plan
    if model.prepared is not None:
        found["TPX_MODEL"] = str(model.prepared.folder)
        if model.tp_plan == "auto":
            found["TPX_TP_PLAN"] = str(run_dir / "plan.yaml")
    if options.kernels:
        found["TPX_KERNELS"] = options.kernels
    if hardware.device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""  # so that `device=None` means what was asked for
    if "OMP_NUM_THREADS" not in environ and hardware.elsewhere is None:
        cores = len(os.sched_getaffinity(0))
        found["OMP_NUM_THREADS"] = str(max(1, cores // hardware.nproc))
    return found
