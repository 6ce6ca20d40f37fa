"""Which tiles a launch uses: tables of what was measured, one JSON file a device, read by shape."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = Path(__file__).parent / "configs"


class Tile(NamedTuple):
    """rows, tokens: of a program's tile. granules: of 64 columns, in a step of its loop (even).
    split: programs that share the columns. parted: four dots of 16 a granule instead of one of 64.
    halvings: how often it may be halved where so few tokens are left. Where kernels overlap: late:
    the next one starts when the product is there, instead of at once; ahead: granules of down, 0 or
    a power of two, that are fetched into the L2 before gate_up has ended."""

    rows: int
    tokens: int
    warps: int
    stages: int
    granules: int
    split: int
    parted: bool
    halvings: int
    late: bool = False
    ahead: int = 0


class Way(NamedTuple):
    """sorted: pairs are sorted by expert first, for many tokens; else a tile has all tokens. upto:
    pairs an expert (mean) that it is meant for, or tokens. overlap: whether a kernel may start
    while the one before it still runs."""

    sorted: bool
    upto: float
    overlap: bool
    gate_up: Tile
    down: Tile

    def wide(self) -> Way:
        """For x of float32, whose tiles are twice as large: less of them in shared memory."""
        gate_up, down = (t._replace(stages=min(t.stages, 2)) for t in (self.gate_up, self.down))
        return self._replace(gate_up=gate_up, down=down)


class Table(NamedTuple):
    """decode: for few tokens; sorted: for more than its last entry is meant for, and the last of
    these for whatever is larger."""

    decode: tuple[Way, ...]
    sorted: tuple[Way, ...]

    @property
    def few(self) -> int:
        """Up to so many tokens are not sorted."""
        return int(self.decode[-1].upto)

    def way(self, tokens: int, top_k: int, experts: int, itemsize: int = 2) -> Way:
        """itemsize: bytes of a number of x. Tiles were measured with 2."""
        if tokens <= self.few:
            found = _first(self.decode, tokens)
        else:
            found = _first(self.sorted, tokens * top_k / max(experts, 1))
        return found if itemsize <= 2 else found.wide()


def partial_dtype(way: Way, dtype: torch.dtype) -> torch.dtype:
    """Of the parts that reduce adds: float32 in decode, where their bytes do not count."""
    return dtype if way.sorted else torch.promote_types(dtype, torch.float32)


def _first(ways: tuple[Way, ...], load: float) -> Way:
    return next((way for way in ways if load <= way.upto), ways[-1])


@cache
def table(names: tuple[str, ...], width: int) -> Table:
    """The first of these devices' that there is, for a model of this hidden size or else for any;
    else the default, which was measured nowhere."""
    files = (FOLDER / f"{re.sub('[^A-Za-z0-9]+', '_', name)}.json" for name in names)
    file = next((file for file in files if file.exists()), FOLDER / "default.json")
    tables = json.loads(file.read_text())
    return parse(tables.get(str(width), tables["any"]))


def parse(entry: dict[str, list[dict[str, object]]]) -> Table:
    return Table(
        tuple(_way(way, False) for way in entry["decode"]),
        tuple(_way(way, True) for way in entry["sorted"]),
    )


def _way(entry: dict, is_sorted: bool) -> Way:
    return Way(
        is_sorted,
        float(entry["upto"]),
        bool(entry["overlap"]),
        Tile(**entry["gate_up"]),
        Tile(**entry["down"]),
    )
