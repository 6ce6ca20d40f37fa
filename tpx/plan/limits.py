"""Holds a plan to its own `limits`: memory of the fullest rank, positions, replicated share."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import PlanError
from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..index import CheckpointIndex
from .cuts import cuts_of
from .memory import Weights, kv_bytes
from .types import Plan


def check_limits(
    plan: Plan, spec: ModelSpec, layout: Layout, index: CheckpointIndex, cut: Iterable[str]
) -> list[tuple[str, int]]:
    """What was proved, each with its number of facts. Raises PlanError.

    Rank 0 is the fullest: split() gives the first ranks the longer parts.
    """
    limits = plan.limits
    found: list[tuple[str, int]] = []
    context = limits.context or spec.max_position_embeddings
    if context > spec.max_position_embeddings:
        raise PlanError(
            f"plan `{plan.path}` has limit context {context}, and the model has "
            f"{spec.max_position_embeddings} positions",
            f"use a context of {spec.max_position_embeddings} or less",
        )
    if limits.memory is None and limits.max_replicated is None:
        return []
    cuts = cuts_of(layout, cut, plan.mesh, plan.mesh.coords(0))
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
            )
        found.append(("the fullest rank stays within the memory limit", 1))
    if limits.max_replicated is not None:
        share = weights.replicated(cuts)
        if share > limits.max_replicated:
            raise PlanError(
                f"plan `{plan.path}` replicates {share:.4f} of the weights' bytes, over its limit "
                f"of {limits.max_replicated:g}",
                "cut more modules, or raise `max_replicated`",
            )
        found.append(("the replicated share stays within its limit", 1))
    return found
