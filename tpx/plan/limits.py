"""Holds a plan to its own `limits`: memory of the fullest rank, positions, replicated share."""

from __future__ import annotations

from ..errors import PlanError
from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..index import CheckpointIndex
from .cuts import Assigned, cuts_of
from .memory import Weights, kv_bytes
from .replicated import whole_modules
from .types import Plan

MOST_OFFENDERS = 3


def check_limits(
    plan: Plan, spec: ModelSpec, layout: Layout, index: CheckpointIndex, assigned: Assigned
) -> list[tuple[str, str, int]]:
    """What was proved: the proof's name, a statement, the number of facts. Raises PlanError.

    Rank 0 is the fullest: split() gives the first ranks the longer parts.
    """
    limits = plan.limits
    found: list[tuple[str, str, int]] = []
    context = limits.context or spec.max_position_embeddings
    if context > spec.max_position_embeddings:
        raise PlanError(
            f"plan `{plan.path}` has limit context {context}, and the model has "
            f"{spec.max_position_embeddings} positions",
            f"use a context of {spec.max_position_embeddings} or less",
            code="P416",
        )
    if limits.memory is None and limits.max_replicated is None:
        return []
    cuts = cuts_of(layout, assigned.cut, plan.mesh, plan.mesh.coords(0))
    weights = Weights.of(layout, index)
    if limits.memory is not None:
        sequences = -(-(limits.batch or 1) // plan.mesh.dp)
        cache = kv_bytes(spec, cuts["KV"].size, context, sequences)
        need = weights.nbytes(cuts, layout) + cache
        if need > limits.memory:
            raise PlanError(
                f"plan `{plan.path}` needs {need:,} bytes on rank 0, {cache:,} of them KV cache "
                f"for {sequences} x {context} tokens, over its limit of {limits.memory:,}",
                "cut over more ranks, or lower `context` or `batch`",
                code="P414",
            )
        found.append(("C12", "the fullest rank stays within the memory limit", 1))
    if limits.max_replicated is not None:
        share = weights.replicated(cuts)
        if share > limits.max_replicated:
            raise _too_much(plan, layout, index, assigned, share)
        found.append(("C11", "the replicated share stays within its limit", 1))
    return found


def _too_much(
    plan: Plan, layout: Layout, index: CheckpointIndex, assigned: Assigned, share: float
) -> PlanError:
    """Names the largest modules that stay whole, and the style that would cut each."""
    cuts = cuts_of(layout, assigned.cut, plan.mesh, plan.mesh.coords(0))
    whole = whole_modules(layout, index, plan.mesh, cuts)
    largest = "; ".join(
        f"`{one.name}` {one.nbytes:,} bytes ({one.advice})" for one in whole[:MOST_OFFENDERS]
    )
    return PlanError(
        f"plan `{plan.path}` replicates {share:.4f} of the weights' bytes, over its limit of "
        f"{plan.limits.max_replicated:g}; the largest: {largest}",
        "cut more modules, or raise `max_replicated`",
        code="P415",
    )
