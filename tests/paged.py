"""A paged cache kept by hand: scattered pages, freed window pages, NaN elsewhere."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from tpx.batch import FULL, SLIDING, Batch, KVCache

# What no sequence owns is NaN: reading a freed or foreign slot spoils the result visibly.


class Pages:
    """Pages of `layers` caches for some sequences; kinds[layer] is FULL or SLIDING."""

    def __init__(
        self,
        kinds: Sequence[int],
        kv_heads: int,
        head_dim: int,
        window: int,
        page: int = 4,
        blocks: int = 64,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        shape = (blocks, page, kv_heads, head_dim)
        self.caches = [
            KVCache(*(torch.full(shape, torch.nan, dtype=dtype) for _ in "kv")) for _ in kinds
        ]
        self.kinds, self.window, self.page = kinds, window, page
        self.free = [random.Random(seed + kind).sample(range(blocks), blocks) for kind in (0, 1)]
        self.tables: list[tuple[list[int], list[int]]] = []
        self.lengths: list[int] = []

    def step(self, tokens: Sequence[Sequence[int]], all_logits: bool = True) -> Batch:
        """A batch that appends tokens[b] to sequence b, which begins with its first ones."""
        while len(self.tables) < len(tokens):
            self.tables.append(([], []))
            self.lengths.append(0)
        past = list(self.lengths)
        for b, new in enumerate(tokens):
            self._drop(b)
            self.lengths[b] += len(new)
            for kind in (FULL, SLIDING):
                table = self.tables[b][kind]
                table += [self.free[kind].pop() for _ in range(self._needed(b) - len(table))]
        return self._batch(tokens, past, all_logits)

    def _needed(self, b: int) -> int:
        return -(-self.lengths[b] // self.page)

    def _drop(self, b: int) -> None:
        """Frees and poisons sliding pages that no further query of the sequence can see."""
        table = self.tables[b][SLIDING]
        for j in range(max(0, self.lengths[b] - self.window + 1) // self.page):
            if table[j] >= 0:
                for kind, cache in zip(self.kinds, self.caches, strict=True):
                    if kind == SLIDING:
                        cache.k[table[j]] = cache.v[table[j]] = torch.nan
                self.free[SLIDING].insert(0, table[j])
                table[j] = -1

    def _batch(self, tokens: Sequence[Sequence[int]], past: list[int], all_logits: bool) -> Batch:
        counts = [len(new) for new in tokens]
        starts = [sum(counts[:b]) for b in range(len(counts) + 1)]
        where = [(b, past[b] + i) for b, n in enumerate(counts) for i in range(n)]
        last = [stop - 1 for start, stop in itertools.pairwise(starts) if stop > start]
        return Batch(
            ids_T=torch.tensor([t for new in tokens for t in new], dtype=torch.int64),
            positions_T=torch.tensor([position for _, position in where], dtype=torch.int64),
            starts_B=torch.tensor(starts, dtype=torch.int32),
            lengths_B=torch.tensor(self.lengths[: len(tokens)], dtype=torch.int32),
            slots_T=(self._slots(where, FULL), self._slots(where, SLIDING)),
            tables_BN=(self._table(len(tokens), FULL), self._table(len(tokens), SLIDING)),
            logits_at=torch.tensor(range(len(where)) if all_logits else last, dtype=torch.int64),
            longest=len(where),
            decode=all(n == 1 for n in counts),
        )

    def _slots(self, where: list[tuple[int, int]], kind: int) -> Tensor:
        page = self.page
        slots = [self.tables[b][kind][p // page] * page + p % page for b, p in where]
        return torch.tensor(slots, dtype=torch.int64)

    def _table(self, rows: int, kind: int) -> Tensor:
        width = max((len(self.tables[b][kind]) for b in range(rows)), default=0)
        table = torch.full((rows, width), -1, dtype=torch.int32)
        for b in range(rows):
            pages = self.tables[b][kind]
            table[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table
