"""Notes which kernels a piece of code would launch, and compiles them in processes side by side.

Triton compiles a kernel when it is first launched, one after another, and threads do not help: its
compiler holds the interpreter. What is compiled here lies in its cache on disk, where the launch
then finds it. Nothing here fails a start: what could not be compiled is compiled when launched.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LOG = logging.getLogger("tpx")
WORKER = Path(__file__).with_name("compile_worker.py")
MOST_WORKERS = 16
Job = str  # JSON of what _job says, the same text for the same kernel


class Noted:
    """jobs: kernels that were asked for and are not compiled in this process. skipped: launches
    that did not happen; what they should have written holds anything."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.skipped = 0
        self._stands_in: list[tuple[dict[str, Any], str]] = []
        self._lock = threading.Lock()

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """What Triton calls before it compiles; whether it shall neither compile nor launch."""
        try:
            job = _job(fn.jit_function, compile)
            kernels, key = fn.jit_function.device_caches[compile["device"]][0], compile["key"]
        except Exception:  # another version of Triton: it launches as ever
            LOG.debug("a kernel cannot be noted", exc_info=True)
            return False
        with self._lock:
            self.skipped += 1
            if key not in kernels:  # else another thread was here
                self.jobs.append(job)
                kernels[key] = _Skipped(self)
                self._stands_in.append((kernels, key))
        return True

    def forget(self) -> None:
        for kernels, key in self._stands_in:
            del kernels[key]


class _Skipped:
    """Stands in for a compiled kernel, so that its next launches cost little."""

    def __init__(self, noted: Noted):
        self._noted = noted
        self.function = self.packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self._noted.skipped += 1


@contextmanager
def noting() -> Iterator[Noted]:
    """Within, in any thread of this process, kernels that are not compiled yet are noted and not
    launched. Needs Triton; its interpreter is left alone."""
    runtime, noted = _triton("knobs").runtime, Noted()
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, noted.hook
    try:
        yield noted
    finally:
        runtime.jit_cache_hook = before
        noted.forget()


def _job(kernel: Any, compile: dict[str, Any]) -> Job:
    """packages: (name, folders) of those that the kernel's module lies in, the outermost first.
    data: signature, constants, attributes and options, as Triton writes them. size: of its source,
    for the longest to be begun first."""
    module = sys.modules[kernel.fn.__module__]
    target = _triton("runtime.driver").driver.active.get_current_target()
    parts = module.__name__.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts))]
    said = {
        "packages": [(name, list(sys.modules[name].__path__)) for name in names],
        "module": module.__name__,
        "file": module.__file__,
        "kernel": kernel.fn.__qualname__,
        "target": [target.backend, target.arch, target.warp_size],
        "data": compile["specialization_data"],
        "size": len(kernel.src),
    }
    return json.dumps(said)


def cache_of_kernels() -> Path:
    """Triton's folder."""
    return Path(_triton("knobs").cache.dir)


def _triton(name: str) -> Any:
    return importlib.import_module(f"triton.{name}")


class Failure(NamedTuple):
    job: Job
    error: str


def compile_all(jobs: Sequence[Job], most: int = MOST_WORKERS) -> list[Failure]:
    """Compiles each once, in as many processes as there are jobs or cores, at most `most`; waits
    for them. -> those that could not be, each of which is logged."""
    waiting = deque(_ordered(jobs))
    count = min(len(waiting), len(os.sched_getaffinity(0)), most)
    failures: list[Failure] = []
    if count:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(_work, waiting) for _ in range(count)]:
                failures += done.result()
    failures += [Failure(job, "no process is left to compile it") for job in waiting]
    for failure in failures:
        LOG.debug("not compiled ahead: %s: %s", json.loads(failure.job)["kernel"], failure.error)
    return failures


def _ordered(jobs: Sequence[Job]) -> list[str]:
    """As the workers take them. launcher: whether the job is the first of its kernel's signature,
    for which one C module serves."""
    told = [json.loads(job) for job in dict.fromkeys(jobs)]
    seen = set[tuple[str, ...]]()
    for one in sorted(told, key=lambda one: -one["size"]):
        kinds = one["kernel"], *map(str, json.loads(one["data"])["signature"].values())
        one["launcher"] = kinds not in seen
        seen.add(kinds)
    return [json.dumps(one) for one in sorted(told, key=lambda one: -one["size"])]


def _work(waiting: deque[str]) -> list[Failure]:
    """One process, until no job is left or it dies."""
    command = [sys.executable, "-P", str(WORKER)]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    failures: list[Failure] = []
    try:
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True
        ) as worker:
            while waiting:
                try:
                    job = waiting.popleft()
                except IndexError:  # another thread took it
                    break
                error = _answer(worker, job)
                if error:
                    failures.append(Failure(job, error))
                if worker.poll() is not None:
                    break
    except OSError as error:  # it cannot be started
        LOG.debug("no process to compile in: %s", error)
    return failures


def _answer(worker: Any, job: str) -> str:
    """The error, "" for none."""
    try:
        worker.stdin.write(job + "\n")
        worker.stdin.flush()
    except OSError:
        pass  # it has died, as reading says
    line = worker.stdout.readline()
    if not line:
        return f"the process died with exit code {worker.wait()}"
    return str(json.loads(line)["error"])
