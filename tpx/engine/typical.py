"""The steps of usual traffic: what they launch is compiled before the first request comes.

A launch is compiled anew for each tile that the kernels' tables name for its size, and for numbers
that are 1, multiples of 16, or neither. So there is a step for each power of two of tokens and one
between them, for some counts of sequences, and for each shape of a decode step. Steps that use
top-k or top-p are left out: their kernels are compiled when the first such request comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from ..batch import Batch
from ..comm import Groups
from ..families.steps import DispatchName
from ..kernels.compiling import Noted
from ..models.ahead import Blank, compile_launched, compiles, mark, marker
from ..ops.kernel import Kernels
from ..ops.sample import sample
from .batch import make_batch, make_draws
from .blocks import Pages, pages_for
from .cache import CacheShape, make_caches
from .inputs import Drawn, Inputs
from .request import Request
from .runner import LEAST_PAGES, ROWS
from .scheduler import Chunk, Limits

FEW_ROWS, MOST_CUT_PAGES = 32, 256  # see static_shapes
LENGTHS = 100, 256  # of sequences that have a cache: 7 pages, and a multiple of 16
MOST_ODD = 1024  # see token_counts


class Typical(NamedTuple):
    """limits: of a step. context: tokens of a sequence. static: whether decode steps have fixed
    shapes, see Runner."""

    limits: Limits
    context: int
    static: bool


class Step(NamedTuple):
    batch: Batch
    draws: Drawn


def compile_steps(
    model: nn.Module,
    shape: CacheShape,
    typical: Typical,
    groups: Groups,
    device: torch.device,
    kernels: Kernels,
    dispatch: DispatchName,
) -> None:
    """Compiles what the steps will launch, where it is not known that this was done before. All
    ranks call it together."""
    if not compiles(device):
        return
    # others' kernels may look at what they wrote
    ours = bool(kernels) and all(hasattr(module, "self_test") for module in kernels.values())
    held = [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
    asked = held, shape, typical, groups.mesh, dispatch
    done = marker(kernels.values(), device, asked) if ours else None
    lacks = ours and (done is None or not done.exists())
    mine = torch.tensor([[lacks, typical.static]])
    told = groups.host("world").all_gather(mine, "kernels.lack")
    if not told[:, 0].any():
        return
    # A rank may have lost a kernel to its trial; all run the same steps, for they hold collectives.
    typical = typical._replace(static=bool(told[:, 1].all()))

    @torch.inference_mode()
    def launch(noted: Noted) -> None:
        caches = make_caches(Pages(1, 1), shape, device)
        fixed = static_steps(typical, device) if typical.static else ()
        with Blank(noted):
            for batch, draws in chain(steps(typical, device), fixed):
                logits_BV = model(batch, caches)
                sample(logits_BV, *draws, False, False, kernels.get("sample"))

    compile_launched(launch, device, groups["node"])
    mark(done)


def steps(typical: Typical, device: torch.device) -> Iterator[Step]:
    """Of any shape. All lie in page 0: nothing is written there."""
    limits, context, static = typical
    for tokens in token_counts(limits.tokens):
        whole, rest = divmod(tokens, context)
        lengths = [context] * min(whole, limits.requests) + [rest] * (rest > 0)
        yield given([chunk(n, n) for n in lengths], False, device)
    first, each = chunk(min(2, context), min(2, context)), chunk(1, 1)
    for sequences in sequence_counts(limits.requests):
        yield given([first, *[each] * (sequences - 1)], False, device)
        for length in () if static else sorted({min(length, context) for length in LENGTHS}):
            yield given([chunk(length, 1)] * sequences, True, device)


def static_steps(typical: Typical, device: torch.device) -> Iterator[Step]:
    """Decode steps of the shapes that a Runner has."""
    known = torch.zeros(2 * ROWS[-1], dtype=torch.int64, device=device)
    for rows, pages in static_shapes(typical.limits.requests, typical.context):
        yield Step(*Inputs(rows, pages, ROWS[-1], device).take(known))


def chunk(length: int, size: int) -> Chunk:
    """The last `size` tokens of a sequence."""
    pages = [0] * pages_for(length)
    return Chunk(Request((0,) * length, length + 1, full=pages, sliding=pages), length - size, size)


def given(chunks: list[Chunk], decode: bool, device: torch.device) -> Step:
    longest = sum(chunk.size for chunk in chunks)
    temperature, top_k, top_p, u, *_ = make_draws(chunks, device)
    return Step(make_batch(chunks, longest, decode, device), Drawn(temperature, top_k, top_p, u))


def token_counts(most: int) -> list[int]:
    """1, 2, 3, 4, 7, 8, 13, 16, 25, 32, ... up to `most`: between powers of two, as long as there
    are other kernels for each, an odd number, whose pairs are no multiple of 16."""
    powers = [1 << n for n in range(most.bit_length())]
    between = [power * 3 // 4 + (power > 4) for power in powers if 2 < power <= MOST_ODD]
    return sorted({*powers, *between, most})


def sequence_counts(most: int) -> list[int]:
    """2, 4, 8, 16, 17 and `most`: the kernels of the head and of sampling differ by them."""
    return sorted({*(n for n in (2, 4, 8, 16, 17) if n < most), most} - {1})


def static_shapes(requests: int, context: int) -> list[tuple[int, int]]:
    """(rows, pages) of runner.Shape: the least pages for all rows; longer tables for few rows,
    whose sequences are cut over programs, up to where the cuts do not become more."""
    rows = [n for n in ROWS if n < requests]
    rows += [n for n in ROWS if n >= requests][:1]
    pages = [LEAST_PAGES]
    while pages[-1] < min(pages_for(context), MOST_CUT_PAGES):
        pages.append(2 * pages[-1])
    return [(n, p) for n in rows for p in (pages if n <= FEW_ROWS else pages[:1])]
