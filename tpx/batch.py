"""The values a forward pass takes: one flat batch of tokens, and a layer's paged cache.

Tokens of all sequences lie one after another; there is no padded [B, T]. Knows no scheduler.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FULL, SLIDING = 0, 1  # places in Batch.slots_T and Batch.tables_BN


class KVCache(NamedTuple):
    """One layer's keys and values, each [blocks, page, KV_local, head_dim]."""

    k: Tensor
    v: Tensor


class Batch(NamedTuple):
    """T tokens of B sequences; both may be 0.

    ids_T, positions_T      int64; a sequence's tokens are its last ones, in order
    starts_B                int32 [B + 1]: b's tokens are rows starts_B[b] to starts_B[b + 1]
    lengths_B               int32 [B]: tokens of the sequence in the cache once this step has run
    slots_T                 (full, sliding), int64: where k and v go, page * page_size + offset
    tables_BN               (full, sliding), int32 [B, N]: entry j is the page that holds positions
                            j * page_size on; -1 where it is unused or has left the window
    logits_at               int64 [M]: the rows whose logits are wanted
    longest                 most tokens that any rank holds in this step
    decode                  no rank prefills in this step
    """

    ids_T: Tensor
    positions_T: Tensor
    starts_B: Tensor
    lengths_B: Tensor
    slots_T: tuple[Tensor, Tensor]
    tables_BN: tuple[Tensor, Tensor]
    logits_at: Tensor
    longest: int
    decode: bool
