"""Runs decode steps in fixed shapes, on a GPU as CUDA graphs, without waiting for their tokens.

A step's inputs lie in one buffer that is copied in one go; what it draws stays on the device, where
the next step takes it from, and comes to the host when it is asked for. Rows that a shape has too
many repeat the first one, so that they touch no other expert. Knows requests' pages and no plan.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch, KVCache
from ..comm import Groups
from ..families.spec import ModelSpec
from ..families.steps import DispatchName
from ..launch.beat import COMPILE, STEP, tick
from ..ops.attention import is_fused
from ..ops.kernel import REFERENCE, Kernels
from ..ops.sample import sample
from .inputs import Inputs
from .request import Request
from .scheduler import Chunk

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LEAST_PAGES = 64  # of a table: the launch has one shape for all shorter sequences
WARM_UPS = 2


class Shape(NamedTuple):
    """rows: sequences. pages: of a sequence's tables. What is drawn: see ops.sample."""

    rows: int
    pages: int
    any_top_k: bool
    any_top_p: bool


NO_SHAPE = Shape(0, 0, False, False)


class Flight(NamedTuple):
    """A step that was launched. ids: on the host, once `done` has happened."""

    ids: Tensor
    done: torch.cuda.Event | None
    rows: int

    def tokens(self) -> list[int]:
        """Waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        found: list[int] = self.ids[: self.rows].tolist()
        return found


class Runner:
    """A model with its cache. static: whether decode steps run in fixed shapes, on a GPU captured,
    on a CPU as they are."""

    def __init__(
        self,
        model: nn.Module,
        caches: list[KVCache],
        groups: Groups,
        device: torch.device,
        static: bool,
        kernels: Kernels = REFERENCE,
    ):
        self.model, self.caches, self.device = model, caches, device
        self.tp = groups["tp"]
        self.static, self.kernel = static, kernels.get("sample")
        self._most = ROWS[-1] if static else 0
        self._steps = dict[Shape, _Step]()
        # First the ids of the last step, by its rows; then those that the host gives.
        self._known = torch.zeros(2 * ROWS[-1], dtype=torch.int64, device=device)
        self._last = dict[int, int]()  # request's id -> its row of the last step
        captured = static and device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if captured else None
        if captured:  # before the groups end at exit, which was registered earlier
            atexit.register(_release, weakref.ref(self))

    def shape(self, chunks: Sequence[Chunk]) -> Shape | None:
        """The least shape that the chunks fit; None: they are not one token each that another
        follows, or there is no shape for so many."""
        fixed = all(c.size == 1 and c.draws and c.request.logprobs is None for c in chunks)
        if not fixed or not 0 < len(chunks) <= self._most:
            return None
        return shape_of([chunk.request for chunk in chunks])

    def forward(self, batch: Batch) -> Tensor:
        """logits [M, V] of any batch, as it comes."""
        logits: Tensor = self.model(batch, self.caches)
        return logits

    def launch(self, chunks: Sequence[Chunk], shape: Shape) -> Flight:
        """Begins a step. Requests whose last token the host does not know yet were in the step
        before. shape: one that the chunks fit, the same on all ranks."""
        requests = [chunk.request for chunk in chunks]
        step = self._step(shape)
        sources = [self._last[r.id] if r.pending else -1 for r in requests]
        step.run(chunks, sources)
        self._last = {request.id: row for row, request in enumerate(requests)}
        return step.land(len(chunks))

    def release(self) -> None:
        """Lets go of the graphs. NCCL's groups wait, when they end, for those that hold their
        collectives."""
        for step in self._steps.values():
            if step.graph is not None:
                step.graph.reset()
        self._steps.clear()

    def _step(self, shape: Shape) -> _Step:
        if shape not in self._steps:
            self._steps[shape] = _Step(shape, self)
        return self._steps[shape]


class _Step:
    """One shape: its buffers, and what runs on them. Two sets of buffers on the host: one is filled
    while the other is copied."""

    def __init__(self, shape: Shape, runner: Runner):
        self.shape, self.device = shape, runner.device
        self.inputs = Inputs(shape.rows, shape.pages, ROWS[-1], runner.device)
        self.ids = torch.zeros(shape.rows, dtype=torch.int64, device=runner.device)
        pin = runner.device.type == "cuda"
        self.landed = [torch.zeros(shape.rows, dtype=torch.int64, pin_memory=pin) for _ in "ab"]
        self.turn = 0
        self.graph: Any = None
        self.replay = self._captured(runner)

    def run(self, chunks: Sequence[Chunk], sources: Sequence[int]) -> None:
        self.inputs.fill(chunks, sources)
        self.replay()

    def land(self, rows: int) -> Flight:
        """Begins to copy what was drawn to the host."""
        self.turn ^= 1
        ids, done = self.landed[self.turn], None
        ids.copy_(self.ids, non_blocking=True)
        if self.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Flight(ids, done, rows)

    def _captured(self, runner: Runner) -> Callable[[], None]:
        def compute() -> None:
            given = self.inputs.take(runner._known)
            logits_BV = runner.forward(given.batch)
            draws, shape = given.draws, self.shape
            kinds = shape.any_top_k, shape.any_top_p
            drawn = sample(logits_BV, *draws, *kinds, runner.kernel)
            self.ids.copy_(runner.tp.broadcast(drawn, 0, "engine.sample"))
            runner._known[: shape.rows].copy_(self.ids)

        if self.device.type != "cuda":
            return compute
        tick(COMPILE)
        kept = runner._known.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # What another thread asks of the device, as torch's watchdog does, is no fault of this one.
        with torch.cuda.graph(self.graph, pool=runner._pool, capture_error_mode="thread_local"):
            compute()
        runner._known.copy_(kept)
        tick(STEP)
        replay: Callable[[], None] = self.graph.replay
        return replay


def _release(reference: weakref.ref[Runner]) -> None:
    if (runner := reference()) is not None:
        runner.release()


def captures(
    device: torch.device, spec: ModelSpec, kernels: Kernels, dispatch: DispatchName
) -> bool:
    """Whether a decode step can be a CUDA graph: nothing in it waits for the host. dispatch: of
    decode steps; all-to-all's shapes depend on the routing."""
    waits = {"attention", "experts", "sample"} - kernels.keys() or spec.experts != "mxfp4"
    static = dispatch != "all_to_all"
    return device.type == "cuda" and static and not waits and is_fused(kernels["attention"])


def shape_of(requests: Sequence[Request]) -> Shape:
    rows = next(rows for rows in ROWS if rows >= len(requests))
    pages = LEAST_PAGES
    while pages < max(len(request.full) for request in requests):
        pages *= 2
    drawing = [request for request in requests if request.temperature > 0]
    any_top_k = any(request.top_k > 0 for request in drawing)
    return Shape(rows, pages, any_top_k, any(request.top_p < 1 for request in drawing))
