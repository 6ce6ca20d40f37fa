"""The launcher's own records in the run's folder: run.json (what ran, how it ended) and
events.jsonl (what happened, a line each). A full disk stops neither a job nor its error."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..version import __version__
from .preflight import Job


class RunFiles:
    """Written as the job goes; run.json says how it ended once it has."""

    def __init__(self, job: Job):
        self._folder, self._began = job.run_dir, time.time()
        self._run: dict[str, Any] = {
            "tpx": __version__,
            "argv": sys.argv,
            "cwd": str(Path.cwd()),
            "began": round(self._began, 3),
            "ranks": job.nproc,
            "nodes": job.nodes,
            "node_rank": job.node_rank,
            "device": job.device,
            "command": {"kind": job.command.kind, "name": job.command.name,
                        "args": job.command.args},
            "environment": job.environment,
        }  # fmt: skip
        self._write()
        self.event("start", ranks=job.nproc)

    def event(self, kind: str, **told: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **told})
        with suppress(OSError), (self._folder / "events.jsonl").open("a") as file:
            file.write(f"{line}\n")

    def end(self, exit_code: int, error: str) -> None:
        self.event("end", exit_code=exit_code)
        seconds = round(time.time() - self._began, 3)
        self._run |= {"seconds": seconds, "exit_code": exit_code, "error": error}
        self._write()

    def _write(self) -> None:
        path = self._folder / "run.json"
        part = path.with_suffix(".part")
        with suppress(OSError):
            part.write_text(json.dumps(self._run, indent=1))
            part.replace(path)
