"""Mixture-of-Experts layers with MXFP4 weights, in Triton: router, experts, and the sum after them.

Works without triton or a GPU: every operation then runs its torch reference.
"""

from __future__ import annotations

from . import reference
from .api import (
    Experts,
    Router,
    experts,
    experts_sorted,
    reduce,
    reduce_residual_norm,
    residual_norm,
    route,
    route_experts,
)
from .layout import packed_nbytes
from .packing import Packed, pack, unpack
from .selftest import Trial, self_test

__version__ = "1"
__all__ = [
    "Experts",
    "Packed",
    "Router",
    "Trial",
    "experts",
    "experts_sorted",
    "pack",
    "packed_nbytes",
    "reduce",
    "reduce_residual_norm",
    "reference",
    "residual_norm",
    "route",
    "route_experts",
    "self_test",
    "unpack",
]
