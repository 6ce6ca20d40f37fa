"""An explained plan as JSON: every number that the tables and the page show, and those behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..families.steps import Collective
from ..mesh import AXES
from ..plan.explain import Alike, Explained, Row
from ..plan.prepare import Prepared
from .plan_words import runs, sent


def as_json(prepared: Prepared, explained: Explained) -> dict[str, Any]:
    """Bytes everywhere. `ranks`: those that hold shards of the same sizes, as [first, last]."""
    mesh, layers = prepared.plan.mesh, prepared.spec.num_hidden_layers
    phases = {"prefill": explained.prefill, "decode": explained.decode}
    first = explained.alike[0].memory
    return {
        "plan": prepared.plan.path,
        "model": prepared.plan.model,
        "world": prepared.world,
        "digest": prepared.digest,
        "mesh": {axis: getattr(mesh, axis) for axis in AXES},
        "dispatch": explained.dispatch._asdict(),
        "load": {
            **explained.load._asdict(),
            "sequences_a_rank": explained.load.sequences(mesh),
            "step_tokens": explained.load.step(mesh),
        },
        "rules": [_rule(row) for row in explained.rows],
        "collectives": {phase: _steps(steps) for phase, steps in phases.items()},
        "bytes_a_token": {phase: sent(steps, layers) for phase, steps in phases.items()},
        "ranks": [_ranks(alike) for alike in explained.alike],
        "estimated": ["activations", "moments", "total"],
        "rank_bytes": explained.rank_bytes,
        "checkpoint_bytes": explained.checkpoint_bytes,
        "kv_bytes": first.kv_cache,
        "replicated": {
            "share": explained.replicated,
            "bytes": sum(whole.nbytes for whole in explained.whole),
            "modules": [whole._asdict() for whole in explained.whole],
        },
        "proofs": [proof._asdict() for proof in prepared.proofs],
        "notes": prepared.report,
    }


def _rule(row: Row) -> dict[str, Any]:
    return {
        "pattern": row.rule.pattern,
        "style": row.rule.style,
        "line": row.rule.line,
        "bytes": row.nbytes,
        "collectives": row.collectives,
        "parameters": [kind._asdict() for kind in row.kinds],
    }


def _steps(steps: Sequence[Collective]) -> list[dict[str, Any]]:
    return [{**step._asdict(), "bytes": step.nbytes} for step in steps]


def _ranks(alike: Alike) -> dict[str, Any]:
    return {"ranks": runs(alike.ranks), **alike.memory._asdict(), "total": alike.memory.total}
