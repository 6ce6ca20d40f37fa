"""Models of headers alone, and what `auto` weighs them by: no files, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headers import layout_of, make_config

from tpx.families import family_of
from tpx.index import CheckpointIndex, TensorMeta
from tpx.plan.auto import Candidate, Search, search
from tpx.plan.cost import Model
from tpx.plan.device import DEVICES
from tpx.plan.links import Links, Table
from tpx.plan.topology import read_topology, topology_for
from tpx.plan.wants import Wants, Work

BIG: dict[str, Any] = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
    "num_experts_per_tok": 4, "max_position_embeddings": 131072, "sliding_window": 128,
}  # fmt: skip
SMALLER: dict[str, Any] = {**BIG, "num_hidden_layers": 24, "num_local_experts": 32}


def model_of(**changes: Any) -> Model:
    """As of a checkpoint of that config."""
    config = make_config(**changes)
    family, layout = family_of(config), layout_of(config)
    metas = {
        name: TensorMeta(name, "f", p.dtypes[0], p.shape, 0, 0)
        for name, p in layout.parameters.items()
    }
    index = CheckpointIndex(Path(), metas, {}, "")
    return Model.of(family.spec(config), layout, index, family.collectives)


def wants_of(
    world: int, topology: str | None = None, device: str = "h100", table: Table | None = None,
    **wants: Any,
) -> Wants:  # fmt: skip
    """On paper: no table of this machine is looked for."""
    told = read_topology(topology) if topology else None
    links = Links(DEVICES[device], topology_for(world, told), table, "stated")
    return Wants(world, links=links, **wants)


def found(model: Model, world: int, **settings: Any) -> Search:
    return search(model, wants_of(world, **settings))


def work_of(model: Model, world: int, **settings: Any) -> Work:
    return Work.of(wants_of(world, **settings), model.spec)


def names(one: Candidate) -> tuple[object, ...]:
    return one.mesh, one.cut, one.word
