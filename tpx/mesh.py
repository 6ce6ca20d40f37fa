"""Two views of the same ranks: dense dp x tp, and expert edp x ep x etp.

rank = dp_i*tp + tp_i = (edp_i*ep + ep_i)*etp + etp_i, so tp and etp vary fastest and stay inside a
host. Ranks of one tp group see the same tokens; ranks of different dp_i see different ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .errors import PlanError

AXES = ("dp", "tp", "edp", "ep", "etp")
# Groups that the axes imply: `expert` holds every expert once; `slice` joins the ranks of a tp
# group that hold different slices of its tokens (one an etp group); `gather` joins the ranks of an
# expert group that see different tokens (one a tp group).
GROUPS = (*AXES, "expert", "slice", "gather", "world")


class Coords(NamedTuple):
    """Where a rank stands on each axis."""

    dp: int
    tp: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the five axes. Raises PlanError where no such mesh exists."""

    dp: int = 1
    tp: int = 1
    edp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise PlanError(
                    f"mesh axis `{axis}` is `{getattr(self, axis)}`",
                    f"give `{axis}` a size of 1 or more",
                    code="P303",
                )
        dense, expert = self.dp * self.tp, self.edp * self.ep * self.etp
        if dense != expert:
            raise PlanError(
                f"the mesh has two views of different sizes: dp {self.dp} x tp {self.tp} = {dense}"
                f", edp {self.edp} x ep {self.ep} x etp {self.etp} = {expert}",
                "make dp*tp equal edp*ep*etp; an axis that is left out is 1",
                code="P304",
            )
        if self.tp % self.etp:
            raise PlanError(
                f"etp {self.etp} does not divide tp {self.tp}, so ranks that add partial sums of "
                "an expert would hold different tokens",
                f"use an etp that divides {self.tp}",
                code="P305",
            )
        if self.tp % (self.ep * self.etp) and (self.ep * self.etp) % self.tp:
            raise PlanError(
                f"an expert group of ep {self.ep} x etp {self.etp} = {self.ep * self.etp} ranks "
                f"neither lies inside a tp group of {self.tp} nor is made of whole tp groups",
                "make one of tp and ep*etp divide the other",
                code="P306",
            )

    @property
    def world(self) -> int:
        return self.dp * self.tp

    @property
    def expert_size(self) -> int:
        """Ranks that hold every expert once between them."""
        return self.ep * self.etp

    def coords(self, rank: int) -> Coords:
        assert 0 <= rank < self.world, f"{rank=} {self.world=}"
        dp, tp = divmod(rank, self.tp)
        rest, etp = divmod(rank, self.etp)
        edp, ep = divmod(rest, self.ep)
        return Coords(dp, tp, edp, ep, etp)

    def group(self, name: str, rank: int) -> tuple[int, ...]:
        """The ranks, ascending, that share group `name` (one of GROUPS) with `rank`."""
        mine = self._key(name, rank)
        return tuple(r for r in range(self.world) if self._key(name, r) == mine)

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """Every group `name` (one of GROUPS): the ranks of each, ascending, in order of the first.

        One pass over the ranks, where group() would be one for each of them.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            found.setdefault(self._key(name, rank), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def nodes(self, local_world: int) -> list[tuple[int, ...]]:
        """The ranks of each machine: `local_world` consecutive ones, or one where those do not make
        up the world."""
        size = local_world if self.world % local_world == 0 else 1
        return [tuple(range(first, first + size)) for first in range(0, self.world, size)]

    def size(self, name: str) -> int:
        """How many ranks each group `name` (one of GROUPS) has."""
        match name:
            case "expert":
                return self.expert_size
            case "slice":
                return self.tp // self.etp
            case "gather":
                return max(1, self.expert_size // self.tp)
        assert name in GROUPS, f"{name=} is none of {GROUPS}"
        return int(getattr(self, name))

    def _key(self, name: str, rank: int) -> tuple[int, ...]:
        """What all ranks of a group have in common."""
        c = self.coords(rank)
        match name:
            case "dp":
                return (c.tp,)
            case "tp":
                return (c.dp,)
            case "edp":
                return (c.ep, c.etp)
            case "ep":
                return (c.edp, c.etp)
            case "etp":
                return (c.edp, c.ep)
            case "expert":
                return (c.edp,)
            case "slice":
                return (c.dp, c.tp % self.etp)
            case "gather":
                return (c.edp, c.tp)
            case "world":
                return ()
        raise AssertionError(f"{name=} is none of {GROUPS}")

    def __str__(self) -> str:
        cut = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return " x ".join(cut) or "one rank"
