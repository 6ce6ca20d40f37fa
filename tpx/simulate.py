"""One rank of any mesh in one process: the model's own forward, its collectives noted, not sent.

The model is narrow and its weights are random; mesh, layers, experts, top-k and dispatch are the
plan's. What other ranks would send is drawn at random, their tokens routed evenly. The calls are
compared with those that the plan predicts, byte for byte at the routing that happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .comm import Groups
from .errors import PlanError
from .families.spec import ModelSpec
from .families.steps import Collective, MoE, ranks_reached
from .layers.norm import RMSNorm
from .mesh import Mesh
from .models import BUILDERS
from .moe.layer import MoELayer
from .narrow import ROWS, draw_values, make_batch, make_caches, narrow_sizes
from .ops.kernel import REFERENCE
from .ops.route import route
from .plan.cuts import cuts_of
from .plan.prepare import Prepared
from .plan.types import RankPlan
from .record import Record
from .recording import Arrival, Peers, RecordingGroups

Phase = Literal["prefill", "decode"]
HIDDEN, HEAD_DIM = 32, 8
PAST = 4  # tokens in the cache of a sequence that decodes
SENT = ("moe.tokens", "moe.ids", "moe.weights")  # a row for each that this rank sends
ARRIVED = ("moe.etp", "moe.return")


class Row(NamedTuple):
    """One call, as predicted and as recorded. layer: None outside the layers. predicted, recorded:
    bytes that the rank puts in, None where there is no such call; equal: name, op, group, bytes."""

    layer: int | None
    name: str
    op: str
    group: str
    predicted: int | None
    recorded: int | None
    equal: bool


@dataclass(frozen=True, slots=True)
class Simulation:
    """tokens: of each dp group. spec: of the narrow model. predicted: the calls of one forward, in
    order. arrivals: a layer each, where the dispatch is all-to-all."""

    rank: int
    phase: Phase
    tokens: int
    spec: ModelSpec
    records: tuple[Record, ...]
    predicted: tuple[Collective, ...]
    arrivals: tuple[Arrival, ...]
    rows: tuple[Row, ...]

    @property
    def equal(self) -> bool:
        return all(row.equal for row in self.rows)


@torch.inference_mode()
def simulate(prepared: Prepared, rank: int, tokens: int, phase: Phase, seed: int = 0) -> Simulation:
    """Runs `rank` of the plan's mesh on `tokens` tokens of each dp group: one sequence to prefill,
    or as many sequences that each decode one. Raises PlanError for a rank that is not there."""
    mesh = prepared.plan.mesh
    check(rank, mesh.world, tokens)
    rank_plan = narrow_plan(prepared, rank)
    spec = rank_plan.spec
    generator = torch.Generator().manual_seed(seed)
    peers = Peers(rank_plan, tokens, generator)
    groups = RecordingGroups(mesh, rank, peers)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    model = BUILDERS[spec.model_type](spec, rank_plan, cast(Groups, groups), dtype, REFERENCE)
    for name, parameter in model.named_parameters():
        draw_values(name, parameter, generator)
    routed = watch_routing(model)
    ids = torch.randint(spec.vocab_size, (tokens,), generator=generator).tolist()
    new, past = ([ids], 0) if phase == "prefill" else ([[one] for one in ids], PAST)
    kv_heads, length = rank_plan.cuts["KV"].size, past + len(new[0])
    caches = make_caches(spec, kv_heads, len(new), length, dtype, groups.device)
    model(make_batch(new, past, longest=tokens), caches)

    dispatch = getattr(rank_plan.dispatch, phase)
    once = prepared.family.collectives(spec, mesh, rank_plan.cuts, dispatch)
    arrivals: tuple[Arrival, ...] = ()
    if dispatch == "all_to_all":
        arrivals = tuple(peers.arrival(*pair) for pair in zip(routed, peers.drawn, strict=True))
    load = Load(spec, mesh, tokens, len(new), peers.mine, arrivals)
    calls = unrolled(once, spec.num_hidden_layers)
    return Simulation(
        rank=rank,
        phase=phase,
        tokens=tokens,
        spec=spec,
        records=tuple(groups.records),
        predicted=tuple(step for _, step in calls),
        arrivals=arrivals,
        rows=tuple(compare(calls, groups.records, load)),
    )


def check(rank: int, world: int, tokens: int) -> None:
    if not 0 <= rank < world:
        many = f"ranks are 0 to {world - 1}" if world > 1 else "the only rank is 0"
        raise PlanError(f"the plan has no rank `{rank}`", f"its {many}")
    if tokens < 1:
        raise PlanError(f"`{tokens}` tokens are too few to simulate", "give 1 or more")


def narrow_plan(prepared: Prepared, rank: int) -> RankPlan:
    """What `rank` holds of the narrow model; its shards are not listed, since none is read."""
    spec = replace(prepared.spec, **narrow_sizes(prepared, HIDDEN, HEAD_DIM, ROWS))
    mesh = prepared.plan.mesh
    layout = prepared.family.layout(spec)
    cuts = cuts_of(layout, prepared.assigned.cut, mesh, mesh.coords(rank))
    return replace(prepared.rank_plan(rank), spec=spec, cuts=cuts, shards={})


def watch_routing(model: nn.Module) -> list[Tensor]:
    """Filled by the forward: the experts of this rank's tokens, [T, K] of each layer."""
    seen: list[Tensor] = []

    def look(layer: MoELayer, args: tuple[Tensor, object, RMSNorm, RMSNorm]) -> None:
        (x_TD, _, before, _), router = args, layer.router
        found = route(before(x_TD), router.weight, router.bias, layer.top_k)
        seen.append(found.expert_ids_TK)

    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_pre_hook(look)
    return seen


class Load(NamedTuple):
    """What the bytes of a call depend on. mine: this rank's slice of its tokens."""

    spec: ModelSpec
    mesh: Mesh
    tokens: int
    logit_rows: int
    mine: slice
    arrivals: tuple[Arrival, ...]


Call = tuple[int | None, Collective]


def unrolled(once: Sequence[Collective], layers: int) -> list[Call]:
    """The calls of one forward with their layers, from a list that names those of a layer once."""
    inside = [i for i, step in enumerate(once) if step.per_layer]
    first, stop = (inside[0], inside[-1] + 1) if inside else (len(once), len(once))
    each = [(layer, step) for layer in range(layers) for step in once[first:stop]]
    return [*((None, s) for s in once[:first]), *each, *((None, s) for s in once[stop:])]


def predicted_bytes(call: Call, load: Load) -> int:
    """The plan's formula at the tokens, and at the routing, of this run."""
    layer, step = call
    rows, each = load.tokens, step.elements
    slices = load.mesh.size("slice")
    if step.name == "head":
        rows = load.logit_rows
    elif not step.per_token:
        rows = 1
    elif step.name == "moe.slices":
        rows, each = load.mine.stop - load.mine.start, each * slices
    elif step.name in (*SENT, *ARRIVED):
        assert layer is not None, f"{step=}"
        rows = getattr(load.arrivals[layer], "sent" if step.name in SENT else "arrived")
        spec, mesh = load.spec, load.mesh
        moe = MoE(spec.hidden_size, spec.num_experts_per_tok, spec.num_local_experts, 1)
        each *= slices / ranks_reached(moe, mesh.ep)
    return rows * round(each) * step.itemsize


def compare(calls: Sequence[Call], records: Sequence[Record], load: Load) -> Iterator[Row]:
    for call, record in zip_longest(calls, records):
        predicted = None if call is None else predicted_bytes(call, load)
        recorded = None if record is None else record.nbytes
        layer, said = call or (None, record)
        alike = (said.name, said.op, said.group) == record[:3] if record is not None else False
        equal = alike and predicted == recorded
        yield Row(layer, said.name, said.op, said.group, predicted, recorded, equal)
