"""Plan texts with one thing wrong, and what the proofs say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from headers import make_config, write_folder

from tpx.errors import PlanError, TpxError
from tpx.families import family_of
from tpx.index import CheckpointIndex
from tpx.plan.load import parse_plan
from tpx.plan.proofs import Proof, prove

RULES = {
    "model.embed_tokens": "vocab",
    "model.layers.*.self_attn.{q,k,v}_proj": "colwise",
    "model.layers.*.self_attn.sinks": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.router": "replicate",
    "model.layers.*.mlp.experts": "expert",
    "model.layers.*.{input,post_attention}_layernorm": "replicate",
    "model.norm": "replicate",
    "lm_head": "vocab",
}


def plan_text(mesh: str = "{tp: 2, ep: 2}", limits: str = "", **changes: str | None) -> str:
    """RULES as a file, lines 5 to 13; a key of `changes` is the end of a pattern."""
    rules = dict(RULES)
    for key, value in changes.items():
        name = next((p for p in rules if p.endswith(key)), key)
        rules[name] = value  # type: ignore[assignment]
    lines = [f'  "{p}": {style}' for p, style in rules.items() if style is not None]
    head = ["tpx: 1", "model: gpt_oss", f"mesh: {mesh}", "modules:"]
    return "\n".join([*head, *lines, limits]) + "\n"


def check(text: str, folder: Path, world: int | None = None, **config: Any) -> list[Proof]:
    """The proofs of a plan for a checkpoint of headers with this config."""
    made = make_config(**config)
    write_folder(folder, made)
    plan = parse_plan(text, "p.yaml")
    family = family_of(made)
    spec = family.spec(made)
    index = CheckpointIndex.open(folder)
    return prove(plan, spec, family.layout(spec), index, world or plan.mesh.world, family)


def refusal(text: str, folder: Path, **options: Any) -> tuple[str, str | None]:
    """-> (message, hint) of the PlanError that check() raises."""
    with pytest.raises(TpxError) as error:
        check(text, folder, **options)
    assert type(error.value) is PlanError, error.value
    return error.value.message, error.value.hint
