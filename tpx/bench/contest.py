"""What takes turns in `tpx bench latency|throughput`: ways of running tpx, and a peer.

All of them answer the same questions, greedily and past stop tokens, so that every answer has the
length that was asked for.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..llm import LLM
from ..ops.cpu import references
from ..params import SamplingParams
from ..version import __version__
from .asked import Asked, Question, Way
from .floor import Floor
from .peer import Peer

Answers = list[list[int]]


class Timed(NamedTuple):
    answers: Answers
    seconds: float


class Ours:
    """One way of running tpx, loaded. All ranks call it alike."""

    def __init__(self, way: Way, asked: Asked):
        self.way, self.name = way, way.name
        self.llm = LLM(
            dtype=asked.dtype,
            use_kernels=None if way.use_kernels else False,
            graphs=way.graphs,
            prefix_cache=way.prefix_cache,
            context=asked.most_tokens,
            batch=max(asked.batches),
        )

    def __call__(self, questions: Sequence[Question]) -> Timed:
        params = [params_of(question) for question in questions]
        with self.running():
            begin = time.perf_counter()
            found = self.llm.generate([question.prompt for question in questions], params)
            seconds = time.perf_counter() - begin
        return Timed([completion.token_ids for completion in found], seconds)

    @contextmanager
    def running(self) -> Iterator[None]:
        """On a CPU kernels are the C++ operations, which every LLM of the process shares."""
        on_cpu = self.llm.device.type == "cpu"
        with references() if on_cpu and not self.way.use_kernels else nullcontext():
            yield


def params_of(question: Question) -> SamplingParams:
    return SamplingParams(max_tokens=question.tokens, ignore_eos=True)


class Contest:
    """Everything that is measured, loaded at once so that it can take turns."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.ours = [Ours(way, asked) for way in asked.ways]
        self.llm = self.ours[0].llm
        place = self.llm.worker.place
        self.leads = place.rank == 0
        self.floor = Floor(self.llm)
        self.peer: Peer | None = None
        if asked.peer and self.leads:
            threads = torch.get_num_threads() * place.local_world
            self.peer = Peer(self.llm.prepared.folder, self.llm.dtype, self.llm.device, threads)

    def questions(self, count: int, number: int) -> list[Question]:
        return self.asked.questions(count, self.llm.spec.vocab_size, number)

    def write(self, rows: Sequence[dict[str, Any]], agreements: Sequence[dict[str, Any]]) -> None:
        """Rank 0 writes all that was found, beside what it was found on."""
        llm = self.llm
        found = {
            "bench": self.asked.bench,
            **ran_on(llm),
            "asked": self.asked._asdict() | {"ways": [way.name for way in self.asked.ways]},
            "read_rate": self.floor.rate,
            "peer": self.peer.about() if self.peer else None,
            "rows": rows,
            "same_tokens": agreements,
        }
        del found["asked"]["file"]
        Path(self.asked.file).write_text(json.dumps(found))


def ran_on(llm: LLM) -> dict[str, Any]:
    """Machine and model, as the head of a result says them."""
    on_gpu, place = llm.device.type == "cuda", llm.worker.place
    machine = {
        "device": torch.cuda.get_device_name(llm.device) if on_gpu else processor(),
        "ranks": place.world,
        "threads": torch.get_num_threads() * place.local_world,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tpx": __version__,
    }
    model = {
        "name": llm.prepared.folder.name,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "plan": llm.prepared.plan.path,
        "mesh": str(llm.prepared.plan.mesh),
    }
    return {"machine": machine, "model": model}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())} ({torch.backends.cpu.get_cpu_capability()})"


def agreement(ours: Answers, theirs: Answers) -> dict[str, int | None]:
    """How many sequences are the same, and the first place at which one is not."""
    places = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        for one, other in zip(ours, theirs, strict=True)
    ]
    differ = [place for place in places if place is not None]
    return {
        "sequences": len(places),
        "same": len(places) - len(differ),
        "first_difference": min(differ, default=None),
    }
