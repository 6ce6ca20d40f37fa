"""Measures collectives on the ranks at hand, through comm.Group as a model calls them.

Arguments: the file that rank 0 writes, and the sizes in bytes, by commas. `tpx bench links` starts
it; on several machines `tpx launch --nnodes N ... -m tpx.bench.links FILE` does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..comm import Group, Groups
from ..errors import PlanError
from ..launch.links_file import library_versions
from ..mesh import Mesh
from ..plan.curve import Curve
from ..plan.device import CPU, device_of
from ..plan.links import UNEVEN, Key, Way, to_json
from ..plan.topology import span_of, topology_for
from ..worker import Worker

SIZES = tuple(2**power for power in range(10, 27, 2))  # 1 KB to 64 MB, what one rank puts in
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", UNEVEN)
DTYPE = torch.bfloat16
ROUNDS = 3
AT_ONCE = 2**22  # bytes that one timed loop moves at least, in at most MOST calls
MOST = 20


def main(argv: Sequence[str]) -> None:
    """Raises PlanError where there is one rank only."""
    sizes = tuple(map(int, argv[1].split(","))) if len(argv) > 1 else SIZES
    worker = Worker(None)
    place = worker.place
    if place.world == 1:
        raise PlanError("links are measured between ranks, and there is one", "use `--nproc 2`")
    curves = measure(worker, sizes)
    if place.rank == 0:
        device = CPU
        if worker.device.type == "cuda":
            device = device_of(torch.cuda.get_device_name(worker.device))
        topology = topology_for(place.world, None, place.local_world)
        key = Key(device.name, str(topology), library_versions(device.backend))
        Path(argv[0]).write_text(json.dumps(to_json(key, curves), indent=1))


def measure(worker: Worker, sizes: Sequence[int]) -> dict[Way, Curve]:
    """A curve for each op and each kind of group that an axis of some mesh has: neighbours, and
    ranks as far apart as they can be. All groups of a kind work at the same time."""
    found: dict[Way, Curve] = {}
    place = worker.place
    topology = topology_for(place.world, None, place.local_world)
    for mesh, name in kinds(place.world):
        span = span_of(mesh, name, topology)
        if ("all_reduce", span.ranks, span.per_node) in found:
            continue
        groups = worker.groups(mesh)
        for op in OPS:
            points = [point(groups, groups[name], op, nbytes) for nbytes in sizes]
            curve = Curve.of([nbytes for nbytes, _ in points], [seconds for _, seconds in points])
            found[op, span.ranks, span.per_node] = curve
        groups.close()
    return found


def kinds(world: int) -> list[tuple[Mesh, str]]:
    """For each number of ranks above 1 that divides the world: neighbours, then far apart."""
    counts = [n for n in range(2, world + 1) if world % n == 0]
    near = [(Mesh(dp=world // n, tp=n, edp=world), "tp") for n in counts]
    return near + [(Mesh(dp=n, tp=world // n, edp=world), "dp") for n in counts]


def point(groups: Groups, group: Group, op: str, nbytes: int) -> tuple[int, float]:
    """-> (bytes that a rank put in, at least what one element a rank takes; seconds, the best round
    of the slowest rank)."""
    call, put_in = calls(group, op, nbytes)
    count = max(1, min(MOST, AT_ONCE // put_in))
    best = float("inf")
    for timed in range(ROUNDS + 1):  # the first warms up
        mine = clock(call, count if timed else 1, group.device)
        told = torch.tensor([mine], dtype=torch.float64).to(group.device)
        slowest = float(groups["world"].all_gather(told, "bench.times").max())
        best = min(best, slowest) if timed else best
    return put_in, best


def calls(group: Group, op: str, nbytes: int) -> tuple[Callable[[], object], int]:
    """-> (one collective into which each rank puts about nbytes, how many bytes that is)."""
    n = group.size
    shares = [max(1, nbytes // (DTYPE.itemsize * n))] * n
    if op == UNEVEN:  # the first rank gets half as much again as its share, the others the rest
        lost = shares[0] // 2 // (n - 1)
        shares = [shares[0] + lost * (n - 1), *(share - lost for share in shares[1:])]
    x = torch.zeros(sum(shares), dtype=DTYPE, device=group.device)
    receive = [shares[group.rank]] * n
    match op:
        case "all_reduce":
            return lambda: group.all_reduce(x, "bench"), x.nbytes
        case "all_gather":
            return lambda: group.all_gather(x, "bench"), x.nbytes
        case "reduce_scatter":
            return lambda: group.reduce_scatter(x, "bench"), x.nbytes
    return lambda: group.all_to_all(x, shares, receive, "bench"), x.nbytes


def clock(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one call, of `count` in a row."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / count


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1:])
