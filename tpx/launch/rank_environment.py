"""What torch's elastic launcher adds to the environment of each rank, and the command that it runs.

Written down so that a job can be shown before it starts; a test compares it with ranks that run.
"""

from __future__ import annotations

import os
import sys

from .preflight import Job
from .rendezvous import HERE

LATER = "<chosen at the start>"
LAUNCHER = "<launcher's pid>"


def argv(job: Job) -> list[str]:
    """The same for every rank."""
    words = [word.replace("$$", "$") for word in job.command.argv()]
    return [sys.executable, *(LAUNCHER if word == str(os.getpid()) else word for word in words)]


def shared_environment(job: Job) -> dict[str, str]:
    """What all ranks get, tpx's first."""
    world, nodes = job.nproc * job.nodes[1], job.nodes[1]
    static = job.rendezvous.backend == "static"
    one_port = not job.max_restarts
    host, _, port = job.rendezvous.endpoint.rpartition(":")
    return {
        **job.environment,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(job.nproc),
        "MASTER_ADDR": host if static else job.rendezvous.local_addr or LATER,
        "MASTER_PORT": port if static and one_port else LATER,
        "GROUP_WORLD_SIZE": str(nodes),
        "ROLE_NAME": "tpx",
        "ROLE_WORLD_SIZE": str(world),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": str(job.max_restarts),
        "TORCHELASTIC_RUN_ID": LATER if host == HERE and not static else job.rendezvous.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": str(one_port),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }


def own_environment(job: Job, rank: int) -> dict[str, str]:
    """What one rank gets."""
    node, local = divmod(rank, job.nproc)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "GROUP_RANK": str(node),
        "ROLE_RANK": str(rank),
    }
