"""The report of a job's load, made of what each rank says of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .comm import Group
from .kernels import Choice
from .models.load import LoadReport
from .plan.prepare import Prepared
from .results import RankReport, Report


def share_report(
    world: Group, prepared: Prepared, device: str, load: LoadReport, kernels: Sequence[Choice]
) -> Report:
    """The same on every rank. device, load, kernels: this rank's."""
    mine = [device, load._asdict(), kernels]
    told = world.gather_bytes(json.dumps(mine).encode(), "engine.report")
    said = [json.loads(one) for one in told]
    mesh = prepared.plan.mesh
    ranks = [
        RankReport(rank, mesh.coords(rank), on, **loaded)
        for rank, (on, loaded, _) in enumerate(said)
    ]
    chosen = tuple(Choice(*choice) for choice in said[0][2])
    return Report(mesh, prepared.plan.path, prepared.report, tuple(ranks), chosen)
