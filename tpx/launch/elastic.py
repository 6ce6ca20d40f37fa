"""The only file of the plan side that needs torch: starts a Job with torch's elastic launcher.

Imports torch inside `launch`, after all checks. Knows nothing of models, and prints nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any, NamedTuple

from ..errors import LaunchError
from .preflight import Job


class Failure(NamedTuple):
    """A rank that did not end well, as the launcher saw it; code: negative for a signal."""

    rank: int
    code: int


class Outcome(NamedTuple):
    """signal: of this process, which ended the job. failures: in the order they were seen."""

    failures: tuple[Failure, ...] = ()
    signal: signal.Signals | None = None


def launch(job: Job) -> Outcome:
    """Runs the job to its end. Raises LaunchError (7) where the ranks cannot meet."""
    silence()
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.update(job.environment)
    try:
        elastic_launch(launch_config(job), sys.executable)(*job.command.argv())
    except ChildFailedError as error:
        seen = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        return Outcome(tuple(Failure(rank, failure.exitcode) for rank, failure in seen))
    except SignalException as error:
        return Outcome(signal=error.sigval)
    except (RendezvousError, DistError) as error:
        raise LaunchError(
            f"the ranks could not meet at `{job.rendezvous.endpoint}`: {first_line(error)}",
            "check that the address is right on every machine, and that its port is open",
            exit_code=7,
        ) from error
    return Outcome()


def silence() -> None:
    """Keeps the elastic launcher's log to itself: the parent prints one error of its own."""
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False


def launch_config(job: Job) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    known = LaunchConfig.__dataclass_fields__  # torch 2.11 lacks some
    settings: dict[str, Any] = {"shutdown_timeout": job.shutdown_timeout}
    return LaunchConfig(
        min_nodes=job.nodes[0],
        max_nodes=job.nodes[1],
        nproc_per_node=job.nproc,
        run_id=job.rendezvous.run_id,
        role="tpx",
        rdzv_backend=job.rendezvous.backend,
        rdzv_endpoint=job.rendezvous.endpoint,
        rdzv_configs=dict(job.rendezvous.configs),
        local_addr=job.rendezvous.local_addr,
        max_restarts=job.max_restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(job.run_dir / "elastic")),
        **{name: value for name, value in settings.items() if name in known},
    )


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
