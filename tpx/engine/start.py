"""Makes an engine: compiles what its steps launch, measures the memory that is left for its cache,
on all ranks, and takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..batch import Batch, KVCache
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
from .typical import Typical, compile_steps

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
    static = wanted.graphs and captures(device, shape.spec, kernels, dispatch)
    typical = Typical(limits, wanted.context, static)
    compile_steps(model, shape, typical, groups, device, kernels, dispatch)
    step = measure_step(model, shape, limits, wanted.context, device)
    mine = cache_limit(device, groups["node"].size, wanted.share, step)
    world = groups.host("world")
    least = int(world.all_gather(torch.tensor([mine]), "engine.memory").min())
    pages = plan_pages(shape, limits, wanted.context, least)
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
    batch, caches = largest_step(shape, limits, context, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(batch, caches)
    peak = torch.cuda.max_memory_allocated(device) - before
    del batch, caches
    torch.cuda.empty_cache()
    return peak


def largest_step(
    shape: CacheShape, limits: Limits, context: int, device: torch.device
) -> tuple[Batch, list[KVCache]]:
    """Prompts of `context` tokens that fill a step, logits for as many rows as requests can draw,
    and a cache for them alone."""
    whole, rest = divmod(limits.tokens, context)
    lengths = [context] * whole + [rest] * (rest > 0)
    pages = sum(map(pages_for, lengths))
    blocks = Blocks(pages, pages, shape.spec.sliding_window, shares=False)
    chunks = [Chunk(Request((0,) * length, context), 0, length) for length in lengths]
    for chunk in chunks:
        blocks.grow(chunk.request, chunk.stop)
    batch = make_batch(chunks, limits.tokens, False, device)
    rows = torch.arange(limits.requests, device=device)
    return batch._replace(logits_at=rows), make_caches(Pages(pages, pages), shape, device)
