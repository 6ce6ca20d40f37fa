"""What each rank of `tpx doctor --ranks N` runs: two collectives, whether they are right, and how
fast. Argument: the file that rank 0 writes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .bench.links import AT_ONCE, MOST, point
from .comm import Group
from .errors import PlanError
from .mesh import Mesh
from .worker import Worker

SECONDS = 5.0  # in which all sizes end, or the largest are left out
SIZES = tuple(2**power for power in range(16, 29, 4))  # 64 KB to 256 MB, what one rank puts in
OPS = ("all_reduce", "all_to_all")


def main(argv: Sequence[str]) -> None:
    """Raises PlanError where there is one rank only."""
    worker = Worker(None)
    world = worker.place.world
    if world == 1:
        raise PlanError("a self-test is between ranks, and there is one", "use `--ranks 2`")
    groups = worker.groups(Mesh(tp=world, edp=world))
    everyone = groups["world"]
    points = list[tuple[str, int, float]]()
    failed = wrong(everyone)
    began = time.perf_counter()
    for nbytes in SIZES:
        begin = time.perf_counter()
        points += [(op, *point(groups, everyone, op, nbytes)) for op in OPS]
        now = time.perf_counter()
        next_one = (now - begin) * moved(16 * nbytes) / moved(nbytes)
        told = torch.tensor([now - began + next_one]).to(everyone.device)
        if float(everyone.all_gather(told, "selftest.time").max()) > SECONDS:
            break
    if worker.place.rank == 0:
        Path(argv[0]).write_text(json.dumps({"wrong": failed, "points": points}))
    groups.close()


def moved(nbytes: int) -> int:
    """Bytes of all calls that bench.point times at once."""
    return nbytes * max(1, min(MOST, AT_ONCE // nbytes))


def wrong(group: Group) -> list[str]:
    """The collectives whose result is not what it must be on every rank."""
    n, rank = group.size, group.rank
    x = torch.full((n, 4), float(rank + 1), device=group.device)
    summed = group.all_reduce(x.clone(), "selftest")
    sent = x + torch.arange(n, device=group.device)[:, None] * n  # row j goes to rank j
    received = group.all_to_all(sent, [1] * n, [1] * n, "selftest")
    expected = torch.arange(1, n + 1, device=group.device)[:, None] + rank * n
    right = torch.tensor(
        [bool((summed == n * (n + 1) / 2).all()), bool((received == expected).all())]
    )
    everywhere = group.all_gather(right.to(group.device).float()[None], "selftest.right")
    return [op for op, share in zip(OPS, everywhere.mean(0).tolist(), strict=True) if share < 1]


if __name__ == "__main__":
    main(sys.argv[1:])
