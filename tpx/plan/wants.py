"""What `auto` is asked for: how many ranks, which work, on what device and links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import PlanError
from ..families.spec import ModelSpec
from .device import CPU, Device
from .links import Links
from .load import read_size
from .topology import Topology, topology_for
from .types import MOST_RANKS

Phase = Literal["decode", "prefill", "balanced"]
PHASES: tuple[Phase, ...] = ("decode", "prefill", "balanced")
MOST_CONTEXT = 8192  # tokens a sequence, where no context is given


@dataclass(frozen=True, slots=True)
class Wants:
    """memory: bytes a rank may hold; None: any number. context: tokens of a sequence in the cache.
    batch: sequences of the whole job. None for either: see `Work.of`."""

    world: int
    memory: int | None = None
    phase: Phase = "balanced"
    context: int | None = None
    batch: int | None = None
    links: Links | None = None

    @property
    def device(self) -> Device:
        return CPU if self.links is None else self.links.device


@dataclass(frozen=True, slots=True)
class Work:
    """Wants with every value filled in for one model."""

    world: int
    memory: int | None
    phase: Phase
    context: int
    batch: int
    links: Links

    @property
    def device(self) -> Device:
        return self.links.device

    @property
    def topology(self) -> Topology:
        return self.links.topology

    @classmethod
    def of(cls, wants: Wants, spec: ModelSpec) -> Work:
        """One sequence a rank, of at most MOST_CONTEXT tokens, where the wants leave it open.

        Raises PlanError for values that no plan can serve.
        """
        check_world(wants.world)
        most = spec.max_position_embeddings
        if wants.context is not None and wants.context > most:
            raise PlanError(
                f"`--context {wants.context}` is more than the model's {most:,} positions",
                f"use a context of {most} or less",
            )
        links = wants.links or Links(CPU, topology_for(wants.world, None, wants.world))
        return cls(
            wants.world,
            wants.memory,
            wants.phase,
            wants.context or min(most, MOST_CONTEXT),
            wants.batch or wants.world,
            links,
        )


def check_world(world: int) -> None:
    if world < 1:
        raise PlanError(f"`--world` is `{world}`", "give the number of ranks, 1 or more")
    if world > MOST_RANKS:
        raise PlanError(f"`--world {world}` is more ranks than {MOST_RANKS:,}", "use fewer ranks")


def read_memory(text: str) -> int:
    """From `80GB` or `80GiB`; a bare number could be either. Raises PlanError."""
    found = read_size(text)
    if found is None or text.isdecimal():
        raise PlanError(f"`--memory {text}` is no size", "write `--memory 80GB` or `80GiB`")
    return found
