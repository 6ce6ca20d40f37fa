"""The cache of one engine: how many pages there is memory for, and the tensors that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..batch import KVCache
from ..errors import LaunchError, RequestError
from ..families.spec import ModelSpec
from ..plan.buffers import PAGE
from .blocks import Blocks, Pages, pages_for, window_pages
from .request import Request
from .scheduler import Limits

GPU_SHARE, CPU_SHARE = 0.9, 0.25  # of memory, where nothing else is said


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


def plan_pages(shape: CacheShape, limits: Limits, context: int, limit: int) -> Pages:
    """Pages for `limits.requests` sequences of `context` tokens, or as many as `limit` bytes hold.

    Sliding layers, which need little, get theirs first, up to half of it. Raises LaunchError where
    there is no room for a single page beside a window.
    """
    whole = pages_for(context)
    step, each = pages_for(limits.tokens), min(whole, window_pages(shape.spec.sliding_window) + 1)
    wanted = Pages(1 + limits.requests * whole, step + limits.requests * each)
    if shape.bytes(wanted) <= limit:
        return wanted
    one = max(1, shape.bytes(Pages(0, 1)))
    sliding = min(wanted.sliding, max(step + each, limit // 2 // one))
    left = limit - shape.bytes(Pages(0, sliding))
    full = min(wanted.full, left // max(1, shape.bytes(Pages(1, 0))))
    if full < 1:
        raise LaunchError(
            f"a cache of one page needs `{shape.bytes(Pages(1, step + each)):,}` bytes a rank, and "
            f"there is room for `{max(0, limit):,}`",
            "raise `memory_fraction`, or cut the model over more ranks",
        )
    return Pages(full, sliding)


def check_room(request: Request, name: str, blocks: Blocks, shape: CacheShape) -> None:
    """Raises RequestError where the whole cache cannot hold the request alone."""
    if not blocks.can_hold(request):
        needed = shape.bytes(blocks.alone(request))
        held = shape.bytes(Pages(blocks.full.size, blocks.sliding.size))
        raise RequestError(
            f"{name} and its new tokens, `{request.limit}` in all, need `{needed}` bytes of cache "
            f"a rank, and there are `{held}`",
            "lower `max_tokens`, shorten the prompt, or cut the heads over more ranks (tp)",
        )


def make_caches(pages: Pages, shape: CacheShape, device: torch.device) -> list[KVCache]:
    """A KVCache for each layer, zeroed: what is masked is multiplied by 0, and must be a number."""

    def zeros(kind: str) -> torch.Tensor:
        blocks = pages.full if kind == "full_attention" else pages.sliding
        size = (blocks, PAGE, shape.kv_heads, shape.spec.head_dim)
        if device.type != "cpu":
            return torch.zeros(size, dtype=shape.dtype, device=device)
        # numpy's zeros take memory when they are written to, torch's at once.
        nbytes = np.zeros(int(np.prod(size)) * shape.dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(nbytes).view(shape.dtype).view(size)

    return [KVCache(zeros(kind), zeros(kind)) for kind in shape.spec.layer_types]


def cache_limit(device: torch.device, ranks: int, share: float | None, step: int) -> int:
    """Bytes that one rank's cache may take. share: of a GPU's memory, for all that is on it, of
    which a step's own tensors take `step` bytes; on a CPU of what is available, which the `ranks`
    of the machine share."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total * (share or GPU_SHARE)) - (total - free) - step
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return int(available * (share or CPU_SHARE)) // ranks - step
