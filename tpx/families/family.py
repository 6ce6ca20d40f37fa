"""Family: what one model architecture tells the planner. A value of four functions and a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..mesh import Mesh
from .flow import Flow
from .layout import Layout
from .spec import ModelSpec
from .steps import Collective, Cut, DispatchName


class Family(NamedTuple):
    """model_type: as in config.json.

    spec(config) -> ModelSpec raises CheckpointError. layout(spec) names every parameter.
    collectives(spec, mesh, cuts, dispatch) lists one forward's collectives in order, for the rank
    whose cuts they are; those of a layer once, with per_layer True. flow(spec, dispatch) lists the
    steps of the same forward, among which plan/flow.py types every value.
    """

    model_type: str
    spec: Callable[[dict[str, Any]], ModelSpec]
    layout: Callable[[ModelSpec], Layout]
    collectives: Callable[
        [ModelSpec, Mesh, Mapping[str, Cut], DispatchName], tuple[Collective, ...]
    ]
    flow: Callable[[ModelSpec, DispatchName], Flow]
