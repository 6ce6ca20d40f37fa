"""What `tpx verify` runs on every rank: the plan's model and one rank's, module by module.

Both have the same weights, in float32, and the same tokens. Hooks look at what modules give; the
forward is the model's own. Rank 0 runs alone what all ranks run together.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .agree import Said, agree, digest
from .arguments import Arguments, prepare_arguments
from .batch import Batch
from .blame import State, blame, errors_of, watch
from .comm import Group, Groups
from .mesh import Mesh
from .models.load import load_model
from .narrow import draw_values, make_batch, make_caches, narrow_sizes, to_device
from .plan.cuts import assign
from .plan.fetch import fetched
from .plan.prepare import Prepared, prepare
from .plan.resolve import resolve
from .plan.types import Plan
from .read import DTYPES
from .trial import FILE, HEAD_DIM, HIDDEN, LAYERS, Trial, Verdict
from .worker import Worker, run_dir

Perturb = Callable[[nn.Module, int], None]
PHASES = ("prefill", "decode")


def main(argument: str) -> None:
    told = json.loads(argument)
    verdict = verify(Trial(**told | {"ids": tuple(told["ids"])}))
    folder = run_dir()
    assert folder is not None, "`tpx verify` starts its ranks in a run's folder"
    if verdict is not None:
        (folder / FILE).write_text(verdict.to_json())


def verify(
    trial: Trial,
    model: str | None = None,
    tp_plan: str | None = None,
    device: str | None = None,
    perturb: Perturb | None = None,
) -> Verdict | None:
    """The verdict on rank 0, None on the others; all ranks call it together. model, tp_plan: None
    takes TPX_MODEL and TPX_TP_PLAN. perturb(module, rank): changes a rank's model, for tests."""
    worker = Worker(device)
    world = worker.place.world
    everyone = worker.groups(Mesh(tp=world, edp=world))["world"]
    given = Arguments(model, tp_plan, "float32", None)
    prepared, *_ = agree(everyone, lambda: prepare_arguments(given, world))
    agree(everyone, lambda: (trial, {"trials": Said(digest(trial))}))
    with tempfile.TemporaryDirectory(prefix="tpx-verify-") as folder:
        small = shrink(prepared, trial, everyone, Path(folder))
        groups = worker.groups(small.plan.mesh)
        prompts = deal(trial.ids, small.plan.mesh.dp)
        mine = small.plan.mesh.coords(everyone.rank).dp
        with fetched(small, range(world)) as there:
            states = run_sharded(there, prompts, mine, groups, perturb)
            expected = run_alone(there, prompts, worker.device) if everyone.rank == 0 else None
        errors = errors_of(states, reference(states, expected, prompts, mine, everyone))
    told = everyone.gather_bytes(json.dumps(errors).encode(), "verify.errors")
    groups.close()
    if everyone.rank:
        return None
    by_rank = [json.loads(one) for one in told]
    logits = [errors[place][0] for errors in by_rank for place in heads(states)]
    return Verdict(
        error=max(logits, key=lambda error: (error != error, error)),
        fault=blame(states, by_rank),
        compared=sum(map(len, by_rank)),
        tokens=tuple(map(len, prompts)),
        layers=small.spec.num_hidden_layers,
        hidden=small.spec.hidden_size,
        stored=stored_bytes(prepared),
        random=small.folder != prepared.folder,
    )


def heads(states: Sequence[State]) -> list[int]:
    return [place for place, state in enumerate(states) if state.module == "head"]


def deal(ids: tuple[int, ...], dp: int) -> list[list[int]]:
    """A prompt for each dp group, all different and, where it is long enough, of other lengths."""
    turned = [[*ids[i % len(ids) :], *ids[: i % len(ids)]] for i in range(dp)]
    return [one[: max(1, len(ids) - i)] for i, one in enumerate(turned)]


def run_sharded(
    prepared: Prepared,
    prompts: Sequence[list[int]],
    mine: int,
    groups: Groups,
    perturb: Perturb | None,
) -> list[State]:
    """The states of this rank of the plan, on the tokens of its dp group."""
    model = load(prepared, prepared.plan, groups.rank, groups)
    if perturb is not None:
        perturb(model.module, groups.rank)
    return run_two(model, prompts[mine], max(map(len, prompts)))


def run_alone(
    prepared: Prepared, prompts: Sequence[list[int]], device: torch.device
) -> list[list[State]]:
    """The states of one rank that holds everything, for each dp group's tokens."""
    rules = tuple(replace(rule, dispatch="auto") for rule in prepared.plan.rules)
    whole = replace(prepared.plan, mesh=Mesh(), rules=rules)
    model = load(prepared, whole, 0, Groups.alone(device))
    return [run_two(model, prompt, len(prompt)) for prompt in prompts]


class Loaded(NamedTuple):
    """One rank's model, and what its caches depend on."""

    module: nn.Module
    prepared: Prepared
    kv_heads: int
    device: torch.device


def load(prepared: Prepared, plan: Plan, rank: int, groups: Groups) -> Loaded:
    rank_plan = resolve(plan, prepared.spec, prepared.layout, prepared.index, rank)
    module, _ = load_model(prepared, rank_plan, groups, torch.float32, groups.device)
    return Loaded(module, prepared, rank_plan.cuts["KV"].size, groups.device)


@torch.inference_mode()
def run_two(model: Loaded, prompt: list[int], longest: int) -> list[State]:
    """A prefill of the prompt, and a decode step that repeats its first token."""
    spec, count = model.prepared.spec, len(prompt)
    caches = make_caches(spec, model.kv_heads, 1, count + 1, torch.float32, model.device)
    batches: tuple[Batch, ...] = (
        make_batch([prompt], 0, longest, all_logits=True),
        make_batch([prompt[:1]], count, 1, all_logits=True),
    )
    states: list[State] = []
    for phase, batch in zip(PHASES, batches, strict=True):
        with watch(model.module, phase, states):
            model.module(to_device(batch, model.device), caches)
    return states


@torch.inference_mode()
def reference(
    states: Sequence[State],
    expected: Sequence[Sequence[State]] | None,
    prompts: Sequence[list[int]],
    mine: int,
    everyone: Group,
) -> list[Tensor]:
    """What rank 0 alone found for this rank's tokens; all ranks are told of all dp groups."""
    found: list[Tensor] = []
    for group, prompt in enumerate(prompts):
        for place, state in enumerate(states):
            rows = len(prompt) if state.phase == "prefill" else 1
            value = state.value.new_empty(rows, *state.value.shape[1:])
            if expected is not None:
                value = expected[group][place].value
            value = everyone.broadcast(value, 0, "verify.states")
            if group == mine:
                found.append(value)
    return found


def shrink(prepared: Prepared, trial: Trial, everyone: Group, folder: Path) -> Prepared:
    """The first layers that were asked for; a random checkpoint where those are too large."""
    small = first_layers(prepared, trial.layers or prepared.spec.num_hidden_layers)
    if stored_bytes(small) <= trial.max_bytes:
        return small
    if everyone.rank == 0:
        write_random(small, trial.layers or min(LAYERS, small.spec.num_hidden_layers), folder)
    place = everyone.gather_bytes(str(folder).encode(), "verify.model")[0].decode()
    return prepare(place, f"{place}/plan.yaml", prepared.world)


def stored_bytes(prepared: Prepared) -> int:
    """Of the checkpoint's tensors that the model's layers use."""
    sources = {s.tensor for p in prepared.layout.parameters.values() for s in p.sources}
    return sum(prepared.index.tensors[name].nbytes for name in sources)


def first_layers(prepared: Prepared, layers: int) -> Prepared:
    spec = prepared.spec
    if layers == spec.num_hidden_layers:
        return prepared
    spec = replace(spec, num_hidden_layers=layers, layer_types=spec.layer_types[:layers])
    layout = prepared.family.layout(spec)
    return replace(prepared, spec=spec, layout=layout, assigned=assign(prepared.plan, layout))


def write_random(prepared: Prepared, layers: int, folder: Path) -> None:
    """A narrow checkpoint of the same names with random values, and the plan beside it."""
    changes = narrow_sizes(prepared, HIDDEN, HEAD_DIM, None)
    changes["num_hidden_layers"] = layers
    changes["layer_types"] = list(prepared.spec.layer_types[:layers])
    config = prepared.config | changes
    generator = torch.Generator().manual_seed(0)
    family = prepared.family
    tensors: dict[str, Tensor] = {}
    for parameter in family.layout(family.spec(config)).parameters.values():
        for source in parameter.sources if parameter.tied_to is None else ():
            ends = [start + size for start, size in zip(source.begin, source.shape, strict=True)]
            known = tensors.get(source.tensor)
            if known is not None:
                ends = [max(pair) for pair in zip(ends, known.shape, strict=True)]
            tensor = torch.empty(ends, dtype=DTYPES[parameter.dtypes[0]])
            draw_values(source.tensor, tensor, generator)
            tensors[source.tensor] = tensor
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "plan.yaml").write_text(prepared.plan_text())
    save_file(tensors, folder / "model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
