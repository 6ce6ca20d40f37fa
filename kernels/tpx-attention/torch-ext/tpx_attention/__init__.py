"""Attention with sinks, dense decode layers and sampling for Mixture-of-Experts models, in Triton.

Works without triton or a GPU: every operation then runs its torch reference.
"""

from __future__ import annotations

from . import reference
from .attention import decode_attention, prefill_attention, rope_write, rope_write_attention
from .linear import linear_decode
from .sample import sample
from .self_test import BOUND, self_test

__version__ = "1"
__all__ = [
    "BOUND",
    "decode_attention",
    "linear_decode",
    "prefill_attention",
    "reference",
    "rope_write",
    "rope_write_attention",
    "sample",
    "self_test",
]
