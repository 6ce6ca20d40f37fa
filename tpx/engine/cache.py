"""The cache of one engine: how many pages its requests need, and the tensors that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..batch import KVCache
from ..errors import RequestError
from ..families.spec import ModelSpec
from ..plan.buffers import PAGE, STEP_TOKENS
from .blocks import pages_for, resting_pages
from .request import Request


class Pages(NamedTuple):
    """Pages of the two pools; see blocks.Blocks."""

    full: int
    sliding: int

    def fit(self, other: Pages) -> bool:
        """Whether `other` has as many of each."""
        return self.full <= other.full and self.sliding <= other.sliding


class CacheShape(NamedTuple):
    """What a page costs on one rank. kv_heads: those that the rank holds."""

    spec: ModelSpec
    kv_heads: int
    dtype: torch.dtype

    def bytes(self, pages: Pages) -> int:
        """Of the pages' keys and values, over all layers."""
        kinds = self.spec.layer_types
        layers = pages.full * kinds.count("full_attention")
        layers += pages.sliding * kinds.count("sliding_attention")
        return 2 * layers * PAGE * self.kv_heads * self.spec.head_dim * self.dtype.itemsize


def pages_of(request: Request, window: int) -> Pages:
    """What a request may hold between steps; both pools grow with its length."""
    return Pages(pages_for(request.most_cached), resting_pages(request, window))


def step_tokens(prompts: Sequence[Sequence[int]], most: int = STEP_TOKENS) -> int:
    """Tokens that one step computes at most: a short job needs less room."""
    return min(most, max(1, sum(map(len, prompts))))


def plan_pages(
    requests: Sequence[Request], shape: CacheShape, step_tokens: int, limit: int
) -> Pages:
    """Pages for as many requests at once, the largest first, as `limit` bytes allow.

    At least for the largest alone (see check_room): those that wait fit one after another.
    """
    needs = sorted((pages_of(r, shape.spec.sliding_window) for r in requests), reverse=True)
    total = Pages(1, pages_for(step_tokens))
    for count, need in enumerate(needs[:step_tokens]):
        more = Pages(total.full + need.full, total.sliding + need.sliding)
        if count and shape.bytes(more) > limit:
            break
        total = more
    return total


def check_room(request: Request, shape: CacheShape, step_tokens: int, limit: int) -> None:
    """Raises RequestError where a cache of `limit` bytes cannot hold the request alone."""
    needed = shape.bytes(plan_pages([request], shape, step_tokens, 0))
    if needed > limit:
        raise RequestError(
            f"prompt `{request.id}` and its new tokens, `{request.limit}` in all, need `{needed}` "
            f"bytes of cache a rank, and there is room for `{limit}`",
            "lower `max_tokens`, shorten the prompt, or cut the heads over more ranks (tp)",
        )


def make_caches(pages: Pages, shape: CacheShape, device: torch.device) -> list[KVCache]:
    """A KVCache for each layer, zeroed: what is masked is multiplied by 0, and must be a number."""

    def zeros(kind: str) -> torch.Tensor:
        blocks = pages.full if kind == "full_attention" else pages.sliding
        size = (blocks, PAGE, shape.kv_heads, shape.spec.head_dim)
        return torch.zeros(size, dtype=shape.dtype, device=device)

    return [KVCache(zeros(kind), zeros(kind)) for kind in shape.spec.layer_types]


def cache_limit(device: torch.device, ranks: int) -> int:
    """Bytes that one rank's cache may take: on a GPU nine tenths of what is free, on a CPU half of
    what is available, shared by the machine's `ranks`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 9 // 10
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // 2 // ranks
