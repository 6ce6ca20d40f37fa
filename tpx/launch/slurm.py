"""Where this machine stands in a Slurm step: the flags of several machines from its variables.

The step's own counts are read, not the job's: a step may run on a part of the job's machines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ..errors import LaunchError, PlanError
from .options import Options

PORTS = range(20_000, 30_000)  # below the ports that Linux gives to outgoing connections
PLACED = ("node_rank", "master_addr", "master_port", "rdzv_endpoint", "rdzv_backend")


def from_slurm(options: Options, environ: Mapping[str, str]) -> Options:
    """The options with the machines of this step. Raises PlanError, LaunchError."""
    if "SLURM_JOB_ID" not in environ:
        raise LaunchError(
            "`--slurm` reads the variables of a Slurm step, and `SLURM_JOB_ID` is not set",
            "start it by `srun`, or leave out `--slurm`",
        )
    default = Options()
    for field in PLACED:
        if getattr(options, field) != getattr(default, field):
            flag = f"--{field.replace('_', '-')}"
            raise PlanError(f"`{flag}` and `--slurm` say the same", f"leave out `{flag}`")
    nodes = read(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = read(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", str(nodes))
    if nodes > 1 and "SLURM_STEP_NODELIST" not in environ:
        raise LaunchError(
            f"this is the batch script of a job on {nodes} machines, which runs on the first alone",
            "start it by `srun --ntasks-per-node=1 tpx launch --slurm ...`",
        )
    if tasks != nodes:
        raise LaunchError(
            f"this step has {tasks} tasks on {nodes} machine{'s' * (nodes > 1)}, and each task "
            "would start all ranks of its machine",
            f"`srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 tpx launch --slurm ...`",
        )
    if options.nnodes not in ("1", str(nodes)):
        raise LaunchError(
            f"this step has {nodes} machine{'s' * (nodes > 1)}, and {options.nnodes} are asked for",
            f"`srun --nodes={options.nnodes} --ntasks-per-node=1 tpx launch --slurm ...`",
        )
    if nodes == 1:
        return options
    return replace(
        options,
        nnodes=str(nodes),
        node_rank=read(environ, "SLURM_NODEID"),
        master_addr=first_host(environ["SLURM_STEP_NODELIST"]),
        master_port=port_of(environ),
    )


def read(environ: Mapping[str, str], *names: str) -> int:
    """The first of the variables that is set; the last name may be a number itself."""
    text = next((environ[name] for name in names if name in environ), names[-1])
    if not text.isdecimal():
        raise LaunchError(
            f"`--slurm` reads `{names[0]}`, and it is `{environ.get(names[0], 'not set')}`",
            "start it by `srun --ntasks-per-node=1`",
        )
    return int(text)


def first_host(listed: str) -> str:
    """`gpu07` of `gpu[07-09,12],other1`: of each bracket the first number."""
    depth, end = 0, len(listed)
    for at, letter in enumerate(listed):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = at
            break
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", listed[:end])


def port_of(environ: Mapping[str, str]) -> int:
    """The same on every machine of a step, and another one for each step of a job."""
    step = environ.get("SLURM_STEP_ID", "0")
    mixed = int(environ["SLURM_JOB_ID"]) * 31 + (int(step) if step.isdecimal() else 0)
    return PORTS[mixed % len(PORTS)]
