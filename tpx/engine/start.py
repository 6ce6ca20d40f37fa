"""Makes an engine: measures the memory that is left for its cache, on all ranks, and takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..comm import Groups
from ..families.steps import DispatchName
from ..ops.kernel import Kernels
from ..plan.buffers import STEP_TOKENS
from .batch import make_batch
from .blocks import Blocks, Pages, pages_for
from .cache import CacheShape, cache_limit, make_caches, plan_pages
from .engine import Engine
from .request import Request
from .runner import Runner, captures
from .scheduler import Chunk, Limits

REQUESTS = 256  # that a dp group computes at once, where nothing else is said
GPU_STEP_TOKENS = 8192  # a GPU is busy with a prompt of this length, a CPU with less


class Wanted(NamedTuple):
    """context: tokens that a sequence can have. requests: of one dp group at once. share: of the
    memory, see cache.cache_limit. shares_pages: between requests that begin alike. graphs: whether
    decode steps become CUDA graphs, where they can."""

    context: int
    requests: int = REQUESTS
    share: float | None = None
    shares_pages: bool = True
    graphs: bool = True


def limits_of(wanted: Wanted, device: torch.device) -> Limits:
    most = GPU_STEP_TOKENS if device.type == "cuda" else STEP_TOKENS
    tokens = min(most, wanted.context * wanted.requests)
    return Limits(tokens, min(wanted.requests, tokens))


def start_engine(
    model: nn.Module,
    shape: CacheShape,
    wanted: Wanted,
    groups: Groups,
    device: torch.device,
    kernels: Kernels,
    dispatch: DispatchName,
) -> Engine:
    """dispatch: of decode steps. All ranks call it together. Raises LaunchError where a rank has no
    memory for a cache, on all alike."""
    limits = limits_of(wanted, device)
    step = measure_step(model, shape, limits, wanted.context, device)
    mine = cache_limit(device, groups["node"].size, wanted.share, step)
    world = groups.host("world")
    least = int(world.all_gather(torch.tensor([mine]), "engine.memory").min())
    pages = plan_pages(shape, limits, wanted.context, least)
    static = wanted.graphs and captures(device, shape.spec, kernels, dispatch)
    caches = make_caches(pages, shape, device)
    runner = Runner(model, caches, groups, device, static, kernels)
    blocks = Blocks(*pages, shape.spec.sliding_window, wanted.shares_pages)
    return Engine(runner, blocks, limits, groups)


@torch.inference_mode()
def measure_step(
    model: nn.Module, shape: CacheShape, limits: Limits, context: int, device: torch.device
) -> int:
    """Bytes that the largest step takes beside weights and cache; 0 on a CPU, where the cache
    leaves most of the memory free."""
    if device.type != "cuda":
        return 0
    requests: list[Request] = []
    left = limits.tokens
    while left:
        requests.append(Request((0,) * min(left, context), context))
        left -= min(left, context)
    pages = Pages(*2 * [sum(pages_for(len(r.prompt)) for r in requests)])
    blocks = Blocks(*pages, shape.spec.sliding_window, shares=False)
    for request in requests:
        blocks.grow(request, len(request.prompt))
    caches = make_caches(pages, shape, device)
    chunks = [Chunk(request, 0, len(request.prompt)) for request in requests]
    batch = make_batch(chunks, limits.tokens, False, device)
    rows = torch.arange(limits.requests, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(batch._replace(logits_at=rows), caches)
    peak = torch.cuda.max_memory_allocated(device) - before
    del caches
    torch.cuda.empty_cache()
    return peak
