"""Seconds from a process to its first token, by part, and the memory that it took.

One process for each way and round. The floor is a plain read of as many bytes of the checkpoint's
files, by as many threads as the rank has, into memory that is used again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .asked import Asked

if TYPE_CHECKING:
    from ..llm import LLM

PIECE = 4 << 20  # bytes of one read


def main(argument: str) -> None:
    started = since_start()
    asked, clock = Asked.from_json(argument), time.perf_counter
    begin = clock()
    from .contest import Ours, ran_on

    imported = clock()
    ours = Ours(asked.ways[0], asked)
    made = clock()
    llm = ours.llm
    with ours.running():
        ours(asked.questions(1, llm.spec.vocab_size, 0))
    first = clock()
    parts = {
        "start": started,
        "imports": imported - begin,
        "prepare": made - imported - llm.report.seconds,
        "load": llm.report.seconds,
        "first_token": first - made,
    }
    found = {**whole(llm, parts), "way": ours.name}
    if llm.worker.place.rank == 0:
        Path(asked.file).write_text(json.dumps({"row": found, **ran_on(llm)}))


def whole(llm: LLM, parts: dict[str, float]) -> dict[str, Any]:
    """Of all ranks: of each part the slowest one's seconds, bytes in all, the largest peaks."""
    mine = {
        "parts": parts,
        "floor": plain_read(llm),
        "host_peak": host_peak(),
        "device_peak": device_peak(llm),
    }
    world = llm.groups["world"]
    told = [json.loads(one) for one in world.gather_bytes(json.dumps(mine).encode(), "bench.load")]
    slowest = {name: max(one["parts"][name] for one in told) for name in parts}
    floor = max(one["floor"] for one in told)
    return {
        "parts": slowest,
        "seconds": sum(slowest.values()),
        "bytes_read": llm.report.bytes_read,
        "bytes_held": llm.report.bytes_held,
        "rate": llm.report.bytes_read / llm.report.seconds,
        "floor": floor,
        "share": floor / slowest["load"],
        "host_peak": max(one["host_peak"] for one in told),
        "device_peak": max(one["device_peak"] for one in told),
    }


def since_start() -> float:
    """Seconds since this process was started, to a hundredth: field 22 of proc(5)'s stat."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def host_peak() -> int:
    """The most bytes of memory that this process had, files that are mapped included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def device_peak(llm: LLM) -> int:
    import torch

    return torch.cuda.max_memory_allocated(llm.device) if llm.device.type == "cuda" else 0


def plain_read(llm: LLM) -> float:
    """Seconds to read what this rank has read of the files, all ranks at the same time."""
    import torch

    left = llm.report.ranks[llm.worker.place.rank].bytes_read
    spans = []
    for path in sorted(llm.prepared.folder.glob("*.safetensors")):
        for at in range(0, min(left, path.stat().st_size), PIECE):
            spans.append((path, at, min(PIECE, left - at)))
        left = max(0, left - path.stat().st_size)
    threads = torch.get_num_threads()
    llm.groups["world"].all_gather(torch.zeros(1, device=llm.device), "bench.load")  # all begin
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_piece, (spans[i::threads] for i in range(threads))))
    return time.perf_counter() - begin


def read_piece(spans: list[tuple[Path, int, int]]) -> None:
    buffer = bytearray(PIECE)
    for path, at, nbytes in spans:
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            file.readinto(memoryview(buffer)[:nbytes])


if __name__ == "__main__":
    main(sys.argv[1])
