"""From what a user typed to checked values: everything that is decided before torch is imported."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_config, read_generation_config
from ..errors import PlanError
from ..families import family_of
from ..families.family import Family
from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..hub import AUTO, find_model
from ..index import CheckpointIndex
from ..version import __version__
from .cuts import Assigned, assign
from .find import read_plan
from .hf import from_hf
from .presharded import Presharded, open_presharded
from .proofs import Proof, prove
from .reason import auto_plan
from .resolve import resolve
from .types import Plan, RankPlan
from .wants import Wants
from .write import to_yaml

TpPlan = str | os.PathLike[str] | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model and a plan that fit each other.

    text: the plan as YAML, with comments where tpx wrote it. digest: equal on all ranks if they
    were given the same plan, config, headers and tpx. report: notes for the user, such as what a
    Hugging Face dict leaves replicated.
    """

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    spec: ModelSpec
    layout: Layout
    index: CheckpointIndex
    plan: Plan
    world: int
    digest: str
    report: tuple[str, ...]
    family: Family
    text: str
    proofs: tuple[Proof, ...]
    assigned: Assigned
    presharded: Presharded | None = None  # where the folder holds a file a rank

    def rank_plan(self, rank: int) -> RankPlan:
        found = resolve(self.plan, self.spec, self.layout, self.index, rank, self.assigned)
        return found if self.presharded is None else self.presharded.own(found)

    def plan_text(self) -> str:
        """YAML that loads to the same plan."""
        return self.text


def prepare(
    model: str | os.PathLike[str],
    tp_plan: TpPlan,
    world: int,
    revision: str | None = None,
    wants: Wants | None = None,
    download: str = AUTO,
) -> Prepared:
    """Finds the model, reads config and headers, and proves the plan for `world` ranks.

    tp_plan: "auto", a path, a shipped plan's name, or a dict in Hugging Face's form. wants: what
    "auto" plans for; without it the least memory, and for a sharded checkpoint the plan that it
    was cut by. download: "full" fetches the files of a Hub id whole, else their headers alone.
    Raises PlanError and CheckpointError.
    """
    folder = find_model(str(model), revision, download)
    config = read_config(folder)
    family = family_of(config)
    spec = family.spec(config)
    layout = family.layout(spec)
    sharded = open_presharded(folder, config)
    if sharded is None:
        index = CheckpointIndex.open(folder)
    else:
        sharded.check_world(world)
        index = sharded.index
    wants = wants or Wants(world)
    plan, text, report = _plan(tp_plan, family, spec, layout, index, wants, sharded)
    if sharded is not None:
        sharded.check_plan(plan, layout)
    proofs = tuple(prove(plan, spec, layout, index, world, family))
    digest = _digest(to_yaml(plan), config, index)
    return Prepared(
        folder=folder,
        config=config,
        generation_config=read_generation_config(folder),
        spec=spec,
        layout=layout,
        index=index,
        plan=plan,
        world=world,
        digest=digest,
        report=report,
        family=family,
        text=text,
        proofs=proofs,
        assigned=assign(plan, layout),
        presharded=sharded,
    )


def _plan(
    tp_plan: TpPlan,
    family: Family,
    spec: ModelSpec,
    layout: Layout,
    index: CheckpointIndex,
    wants: Wants,
    sharded: Presharded | None,
) -> tuple[Plan, str, tuple[str, ...]]:
    if isinstance(tp_plan, Mapping):
        plan, notes = from_hf(tp_plan, layout, family.model_type, wants.world)
        return plan, to_yaml(plan, "\n".join(notes)), notes
    if not isinstance(tp_plan, str | os.PathLike):
        raise PlanError(
            f"tp_plan is a `{type(tp_plan).__name__}`",
            "give `auto`, a path, a shipped plan's name, or a dict in Hugging Face's form",
            code="P409",
        )
    if str(tp_plan) == "auto" and sharded is not None:
        return sharded.plan, sharded.text, ()
    if str(tp_plan) == "auto":
        plan, text = auto_plan(spec, layout, index, wants, family.collectives)
        return plan, text, ()
    plan = read_plan(str(tp_plan), family.model_type)
    return plan, to_yaml(plan), ()


def _digest(plan_text: str, config: dict[str, Any], index: CheckpointIndex) -> str:
    said = json.dumps(config, sort_keys=True)
    parts = (plan_text, said, index.header_digest, __version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
