"""The only file of the plan side that needs torch: starts a Job with torch's elastic launcher.

Imports torch inside `launch`, after all checks. Knows nothing of models, and prints nothing.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import LaunchError
from .preflight import Job

STATIC = "tpx-static"  # the name of `use_new_ports`'s meeting
Streams = Callable[[str, Mapping[int, int]], dict[int, str]]  # see logs.Logs.paths


class Failure(NamedTuple):
    """A rank that did not end well, as the launcher saw it; code: negative for a signal. time_ns:
    of its end, 0 where it is not known."""

    rank: int
    code: int
    time_ns: int = 0

    def order(self) -> tuple[float, bool]:
        """The earliest first; of those whose time is not known, one that was killed first, since
        others fail because of it."""
        return self.time_ns or math.inf, self.code > 0


class Outcome(NamedTuple):
    """signal: of this process, which ended the job. failures: in the order they were seen."""

    failures: tuple[Failure, ...] = ()
    signal: signal.Signals | None = None


def launch(job: Job, streams: Streams) -> Outcome:
    """Runs the job to its end. streams: where ranks shall write "out" and "err". Raises LaunchError
    (7) where the ranks cannot meet."""
    silence()
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.update(job.environment)
    if job.max_restarts:
        use_new_ports()
    try:
        elastic_launch(launch_config(job, streams), sys.executable)(*job.command.argv())
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


def use_new_ports() -> None:
    """For each attempt a new store, at a new port. Else it finds the addresses of the one before,
    which torch does not tell apart: gloo's ranks then call ranks that are gone."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import api
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import (
        StaticTCPRendezvous,
        create_rdzv_handler,
    )

    class Static(StaticTCPRendezvous):
        """Torch's own has one port for all attempts."""

        attempts = 0
        use_agent_store = False

        def get_backend(self) -> str:
            return STATIC

        def next_rendezvous(self) -> api.RendezvousInfo:
            met = super().next_rendezvous()
            self.attempts += 1
            store = PrefixStore(f"attempt{self.attempts}", met.store)
            where = api.RendezvousStoreInfo.build(self.rank, store, self.master_addr)
            return api.RendezvousInfo(store, met.rank, met.world_size, where)

    def create(params: api.RendezvousParameters) -> api.RendezvousHandler:
        handler = create_rdzv_handler(params)
        handler.__class__ = Static
        return handler

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # of torch's other way to meet
    api.rendezvous_handler_registry.register(STATIC, create)


def silence() -> None:
    """Keeps the elastic launcher's log to itself: the parent prints one error of its own."""
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False


def launch_config(job: Job, streams: Streams) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    static = job.rendezvous.backend == "static"
    known = LaunchConfig.__dataclass_fields__  # torch 2.11 lacks some
    settings: dict[str, Any] = {"shutdown_timeout": job.shutdown_timeout}
    return LaunchConfig(
        min_nodes=job.nodes[0],
        max_nodes=job.nodes[1],
        nproc_per_node=job.nproc,
        run_id=job.rendezvous.run_id,
        role="tpx",
        rdzv_backend=STATIC if static and job.max_restarts else job.rendezvous.backend,
        rdzv_endpoint=job.rendezvous.endpoint,
        rdzv_configs=dict(job.rendezvous.configs),
        local_addr=job.rendezvous.local_addr,
        max_restarts=job.max_restarts,
        monitor_interval=0.1,
        logs_specs=logs_specs(job, streams),
        **{name: value for name, value in settings.items() if name in known},
    )


def logs_specs(job: Job, streams: Streams) -> Any:
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class RankStreams(LogsSpecs):
        """Asked once an attempt, when the agent knows which rank each local rank is."""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            for variables in envs.values():
                variables["TORCHELASTIC_ERROR_FILE"] = ""  # the shim keeps records of its own
            ranks = {local: int(variables["RANK"]) for local, variables in envs.items()}
            return LogsDest(
                stdouts=streams("out", ranks),
                stderrs=streams("err", ranks),
                error_files=dict.fromkeys(envs, os.devnull),
            )

        @property
        def root_log_dir(self) -> str:
            return str(job.run_dir)

    return RankStreams()


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
