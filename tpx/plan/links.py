"""Seconds of one collective: from a measured table where it holds, else from stated figures.

A table is what `tpx bench links` wrote. Knows no model; reads no environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import PlanError
from .curve import Curve
from .device import Device
from .topology import Span, Topology

FORMAT = 1
UNEVEN = "all_to_all_uneven"  # the first rank of a group gets 1.5 times the mean
STATED_BAND = 1.0  # a stated time may be twice as long; or half, which is 1 / (1 + band)
Way = tuple[str, int, int]  # op, ranks of the group, fewest of them on a node


class Key(NamedTuple):
    """What a table was measured on. device: as the driver names it, `cpu` without one."""

    device: str
    topology: str
    versions: Mapping[str, str]


class Table(NamedTuple):
    key: Key
    curves: Mapping[Way, Curve]


class Time(NamedTuple):
    """band: relative, up; measured: from a table."""

    seconds: float
    band: float
    measured: bool


@dataclass(frozen=True, slots=True)
class Links:
    """device: for the stated figures. note: where they come from, a sentence for the user."""

    device: Device
    topology: Topology
    table: Table | None = None
    note: str = ""
    _times: dict[tuple[str, Span, float], Time] = field(default_factory=dict, compare=False)

    def time(self, op: str, span: Span, nbytes: float) -> Time:
        """Of one collective into which each rank puts `nbytes`."""
        key = op, span, nbytes
        if key not in self._times:
            self._times[key] = self._measured(*key) or self._stated(*key)
        return self._times[key]

    def speed(self, span: Span) -> float:
        """Bytes a second that a rank sends in such a group, as stated."""
        return self._inter() if span.crosses else self._intra()

    def _measured(self, op: str, span: Span, nbytes: float) -> Time | None:
        told = self.topology.inter if span.crosses else self.topology.intra
        if self.table is None or told is not None:
            return None
        # Routing sends each rank another number of rows.
        names = (UNEVEN, op) if op == "all_to_all" else (op,)
        found = (self.table.curves.get((name, span.ranks, span.per_node)) for name in names)
        curve = next((one for one in found if one is not None), None)
        if curve is None:
            return None
        return Time(curve.seconds(nbytes), curve.residual, True)

    def _intra(self) -> float:
        return self.topology.intra or self.device.intra.value

    def _inter(self) -> float:
        return self.topology.inter or self.device.inter.value

    def _stated(self, op: str, span: Span, nbytes: float) -> Time:
        wire = _all_to_all if op == "all_to_all" else _ring
        seconds = self._first_byte(op, span) + wire(op, span, nbytes, self._intra(), self._inter())
        return Time(seconds, STATED_BAND, False)

    def _first_byte(self, op: str, span: Span) -> float:
        """A ring in each node, a tree of nodes; all-to-all talks to every rank, to other nodes at
        once; an all-reduce is a reduce-scatter and an all-gather."""
        step, hop = self.device.step.value, self.device.hop.value
        if op == "all_to_all":
            return self.device.start.value + step * (span.ranks - 1) + hop * span.crosses
        once = step * (span.per_node - 1) + hop * log2(span.nodes)
        return self.device.start.value + once * (2 if op == "all_reduce" else 1)


def _ring(op: str, span: Span, nbytes: float, intra: float, inter: float) -> float:
    """Each rank passes its share round a ring; a node's `per_node` ports carry one ring each.

    all_reduce 2 (n-1)/n m, reduce_scatter (n-1)/n m, all_gather (n-1) m, for m bytes put in.
    """
    n = span.ranks
    sent = {"all_reduce": 2 * (n - 1) / n, "reduce_scatter": (n - 1) / n}.get(op, n - 1) * nbytes
    slowest = max(1 / intra, 1 / (span.per_node * inter)) if span.crosses else 1 / intra
    return sent * slowest


def _all_to_all(op: str, span: Span, nbytes: float, intra: float, inter: float) -> float:
    """Of m bytes (k-1)/n stay in the node of k ranks and (n-k)/n leave it, at the same time."""
    n, k = span.ranks, span.per_node
    if not span.crosses:
        return nbytes * (n - 1) / n / intra
    return nbytes * max((k - 1) / n / intra, (n - k) / n / inter)


def to_json(key: Key, curves: Mapping[Way, Curve]) -> dict[str, Any]:
    return {
        "tpx_links": FORMAT,
        "key": {**key._asdict(), "versions": dict(key.versions)},
        "curves": [
            {"op": op, "ranks": ranks, "per_node": per_node, "bytes": curve.nbytes,
             "seconds": curve.times}
            for (op, ranks, per_node), curve in curves.items()
        ],
    }  # fmt: skip


def read_table(path: Path) -> Table:
    """Raises PlanError where the file is none, or of another version of the format."""
    try:
        data = json.loads(path.read_text())
        curves = {
            (c["op"], int(c["ranks"]), int(c["per_node"])): Curve.of(c["bytes"], c["seconds"])
            for c in data["curves"]
        }
        if data["tpx_links"] != FORMAT:
            raise ValueError(data["tpx_links"])
        return Table(Key(**data["key"]), curves)
    except OSError as error:
        raise PlanError(
            f"`{path}` cannot be read ({error.strerror})", "`tpx bench links --out FILE` writes one"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise PlanError(
            f"`{path}` holds no measured links", "`tpx bench links --out FILE` writes one"
        ) from None


def stale(found: Key, wanted: Key) -> str | None:
    """Why a table does not tell about this device and these libraries; None: it does."""
    if found.device != wanted.device:
        return f"they were measured on `{found.device}`, not on `{wanted.device}`"
    for name in sorted({*found.versions, *wanted.versions}):
        then, now = found.versions.get(name, "none"), wanted.versions.get(name, "none")
        if then != now:
            return f"they were measured with {name} {then}, and here is {now}"
    return None
