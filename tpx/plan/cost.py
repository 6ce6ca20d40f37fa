"""Seconds and bytes of one rank, the busiest: a roofline of its memory and its matrix products.

A floor by counts, not a promise: bytes and collectives are exact, the speeds are device.py's and
links.py's, and routing is taken as uniform. Knows no search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from ..families.layout import Layout
from ..families.spec import ModelSpec
from ..families.steps import ITEM_BYTES, Collective, Cut, DispatchName
from ..index import CheckpointIndex
from ..mesh import Mesh
from .buffers import STEP_TOKENS, Load, logits_bytes, moments, pages_bytes
from .busiest import busiest_rows, experts_touched
from .device import Device
from .memory import Weights, kv_bytes
from .topology import span_of
from .types import DispatchPlan
from .wants import Work

Collectives = Callable[[ModelSpec, Mesh, Mapping[str, Cut], DispatchName], tuple[Collective, ...]]
# Norms 2, q-k-v, rotation, cache, attention, output, router, gate-and-up, swiglu, down, combine.
OPERATIONS = 12  # that a layer starts
PROMPT = 8  # prompt tokens for each token written, in `balanced`
Cuts = Mapping[str, Cut]


class Cost(NamedTuple):
    """Seconds for one token of each sequence (decode), or for one prompt token (prefill): what is
    bound by reading weights, by arithmetic and by starting operations, attention with its cache,
    and the collectives. low, high: of the sum, where the estimate's band ends."""

    weights: float
    compute: float
    kv: float
    links: float
    low: float
    high: float

    @property
    def seconds(self) -> float:
        return self.weights + self.compute + self.kv + self.links

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * part for part in self))

    def plus(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


class Memory(NamedTuple):
    """Bytes on the fullest rank. weights and kv are exact, buffers are estimated."""

    weights: int
    kv: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(self)


class Held(NamedTuple):
    """Bytes on a rank: all weights, those that every step reads but for tables (and how many
    elements they are), and those of experts."""

    weights: int
    dense: int
    elements: int
    experts: int


class Step(NamedTuple):
    """One forward of the busiest dp group. everyone: tokens of all groups together. rows: of
    logits. sequences of `context` tokens each are in the cache."""

    tokens: int
    everyone: int
    rows: int
    sequences: float
    context: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model's bytes by what reads them: every step reads all of `dense` and the head's table, and
    of the experts those that are touched. `weights` is all of them."""

    spec: ModelSpec
    layout: Layout
    collectives: Collectives
    weights: Weights
    dense: Weights
    experts: Weights
    head: str  # the logical dimension of the head's table
    _held: dict[tuple[int, ...], Held] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls, spec: ModelSpec, layout: Layout, index: CheckpointIndex, collectives: Collectives
    ) -> Model:
        weights = Weights.of(layout, index)
        tables = [dim.name for dim in layout.dims.values() if dim.table]
        inside = {dim.name for dim in layout.dims.values() if dim.axis != "tp"}

        def part(names: set[str], among: bool) -> Weights:
            return Weights(
                {
                    key: count
                    for key, count in weights.shapes.items()
                    if any(dim.logical in names for dim in key[0]) == among
                }
            )

        dense = part({*tables, *inside}, False)
        # The head's table is the last, and the only one where it is the embedding's.
        return cls(spec, layout, collectives, weights, dense, part(inside, True), tables[-1])

    def held(self, cuts: Cuts) -> Held:
        """Of a rank with these cuts; ranks of equal sizes hold as much."""
        key = tuple(cut.size for cut in cuts.values())
        if key not in self._held:
            elements = Weights({(dims, 8): n for (dims, _), n in self.dense.shapes.items()})
            parts = (self.weights, self.dense, elements, self.experts)
            self._held[key] = Held(*(part.nbytes(cuts, self.layout) for part in parts))
        return self._held[key]


def memory(model: Model, mesh: Mesh, cuts: Cuts, dispatch: DispatchPlan, work: Work) -> Memory:
    """Of rank 0, the fullest: split() gives the first ranks the longer parts."""
    spec, load = model.spec, Load(work.context, work.batch)
    heads = cuts["KV"].size
    live = max(max(moments(spec, mesh, cuts, name, load).values()) for name in set(dispatch))
    buffers = pages_bytes(spec, heads, load, mesh) + logits_bytes(spec, load, mesh) + live
    return Memory(
        model.held(cuts).weights,
        kv_bytes(spec, heads, work.context, load.sequences(mesh)),
        buffers + int(work.device.libraries.value),
    )


def cost(model: Model, mesh: Mesh, cuts: Cuts, dispatch: DispatchPlan, work: Work) -> Cost:
    """Where the device's speeds are not known, of its links alone."""
    parts = []
    if work.phase != "prefill":
        sequences = ceil(work.batch / mesh.dp)
        step = Step(sequences, work.batch, sequences, sequences, work.context)
        parts.append(step_cost(model, mesh, cuts, dispatch.decode, work, step))
    if work.phase != "decode":
        step, steps = _prefill(mesh, work)
        whole = step_cost(model, mesh, cuts, dispatch.prefill, work, step)
        prompt_token = whole.times(steps / (work.batch * work.context))
        share = 1 if work.phase == "prefill" else PROMPT * work.batch
        parts.append(prompt_token.times(share))
    return parts[0] if len(parts) == 1 else parts[0].plus(parts[1])


def _prefill(mesh: Mesh, work: Work) -> tuple[Step, float]:
    """-> (a step of the busiest dp group, how many of them all its prompts take). On average half
    of a prompt is in the cache."""
    whole = ceil(work.batch / mesh.dp) * work.context
    tokens = min(STEP_TOKENS, whole)
    prompts = max(1, tokens // work.context)
    everyone = min(tokens * mesh.dp, work.batch * work.context)
    step = Step(tokens, everyone, prompts, prompts, max(1, work.context // 2))
    return step, whole / tokens


def step_cost(
    model: Model, mesh: Mesh, cuts: Cuts, dispatch: DispatchName, work: Work, step: Step
) -> Cost:
    """Of one forward. Each operation takes as long as its reading or its arithmetic does, and is
    counted where it takes longer."""
    spec, device, layers = model.spec, work.device, model.spec.num_hidden_layers
    operations = (
        (1, _dense(model, cuts, step)),
        (1, _head(model, cuts, step)),
        (layers, expert_work(model, mesh, cuts, dispatch, step)),
    )
    weights = compute = 0.0
    for count, (nbytes, flops) in operations:
        read, done = _seconds(nbytes, flops, device)
        weights += count * read * (read >= done)
        compute += count * done * (read < done)
    compute += layers * OPERATIONS * device.operation.value
    kv = max(_seconds(*_attention(spec, cuts, step), device))
    links, least, most = _links(model, mesh, cuts, dispatch, work, step)
    own, (faster, slower) = weights + compute + kv, device.band
    low, high = own * (1 - faster) + least, own * (1 + slower) + most
    return Cost(weights, compute, kv, links, low, high)


def step_bytes(model: Model, mesh: Mesh, cuts: Cuts, dispatch: DispatchName, step: Step) -> float:
    """What one forward must read on the busiest rank: dense weights in the spec's dtype and the
    head's table once, the experts that are touched, and the cache."""
    spec = model.spec
    experts, _ = expert_work(model, mesh, cuts, dispatch, step)
    dense = model.held(cuts).elements * ITEM_BYTES[spec.dtype]
    head, _ = _head(model, cuts, step)
    cache, _ = _attention(spec, cuts, step)
    return dense + head + spec.num_hidden_layers * experts + cache


def _seconds(nbytes: float, flops: float, device: Device) -> tuple[float, float]:
    if device.read is None or device.matmul is None:
        return 0.0, 0.0
    return nbytes / device.read.value, flops / device.matmul.value


def _dense(model: Model, cuts: Cuts, step: Step) -> tuple[float, float]:
    """Bytes and operations of attention's matrices, router and norms of all layers."""
    held = model.held(cuts)
    return held.dense, 2.0 * step.tokens * held.elements


def _head(model: Model, cuts: Cuts, step: Step) -> tuple[float, float]:
    size = cuts[model.head].size * model.spec.hidden_size
    return size * ITEM_BYTES[model.spec.dtype], 2.0 * step.rows * size


def _attention(spec: ModelSpec, cuts: Cuts, step: Step) -> tuple[float, float]:
    """The cache is read once a sequence; scores and values are 4 Q D operations a pair."""
    nbytes = kv_bytes(spec, cuts["KV"].size, step.context, 1) * step.sequences
    window = min(step.context, spec.sliding_window)
    pairs = sum(step.context if k == "full_attention" else window for k in spec.layer_types)
    return nbytes, 4.0 * step.tokens * pairs * cuts["Q"].size * spec.head_dim


def expert_work(
    model: Model, mesh: Mesh, cuts: Cuts, dispatch: DispatchName, step: Step
) -> tuple[float, float]:
    """-> (bytes, operations) of one layer, on the rank of the ep group that has most."""
    spec = model.spec
    experts, top_k = spec.num_local_experts, spec.num_experts_per_tok
    tokens = _group_tokens(mesh, dispatch, step)
    layers = spec.num_hidden_layers
    one = model.held(cuts).experts / (cuts["E"].size * layers)
    touched = experts_touched(experts, top_k, mesh.ep, tokens)
    rows = busiest_rows(tokens, top_k, experts, mesh.ep)
    return touched * one, 2.0 * rows * 3 * spec.hidden_size * cuts["I"].size


def _group_tokens(mesh: Mesh, dispatch: DispatchName, step: Step) -> int:
    """Tokens whose rows the ranks of one ep group compute between them."""
    if dispatch in ("local", "replicated"):
        return step.tokens
    if mesh.expert_size > mesh.tp:
        return min(step.everyone, step.tokens * mesh.size("gather"))
    slices = mesh.size("slice")  # all-to-all within a tp group: each etp group brings one
    return min(step.tokens, mesh.ep * ceil(step.tokens / slices))


def _links(
    model: Model, mesh: Mesh, cuts: Cuts, dispatch: DispatchName, work: Work, step: Step
) -> tuple[float, float, float]:
    """-> (seconds of all collectives, their low, their high)."""
    layers = model.spec.num_hidden_layers
    total = low = high = 0.0
    for one in model.collectives(model.spec, mesh, cuts, dispatch):
        count = step.rows if one.name == "head" else step.tokens
        nbytes = one.nbytes * (count if one.per_token else 1)
        time = work.links.time(one.op, span_of(mesh, one.group, work.topology), nbytes)
        seconds = time.seconds * (layers if one.per_layer else 1)
        total, low = total + seconds, low + seconds / (1 + time.band)
        high += seconds * (1 + time.band)
    if dispatch == "all_to_all":  # the host must know how many rows come before it can go on
        wait = layers * work.device.host.value
        total, low, high = total + wait, low + wait, high + wait
    return total, low, high
