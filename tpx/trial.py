"""What `tpx verify` tells its ranks, and what they find: values that travel as JSON. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from .errors import PlanError
from .plan.prepare import Prepared
from .prompts import Model, Prompt, check_prompts
from .text import open_tokenizer

TOLERANCE = 1e-4  # of the largest value, in float32
TOKENS = 24  # of a prompt that nobody gave
LAYERS = 4  # of a random model
HIDDEN, HEAD_DIM = 64, 16
FILE = "verify.json"  # in the run's folder


class Trial(NamedTuple):
    """ids: of the prompt. layers: as many as shall run, from the first; None: all of a checkpoint,
    LAYERS of a random model. max_bytes: of a checkpoint that is run itself."""

    ids: tuple[int, ...]
    layers: int | None
    max_bytes: int


class Fault(NamedTuple):
    """Where ranks first leave one rank's values. layer: None outside the layers. module: attention,
    experts, router, norm, embedding or head. error: the largest difference as a share of the
    module's largest value. tie: the router's choice alone differs, between two equal logits."""

    phase: str
    layer: int | None
    module: str
    name: str
    ranks: tuple[int, ...]
    error: float
    tie: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """error: the largest difference of logits as a share of the largest logit, over all ranks,
    prefill and decode. compared: modules' outputs on all ranks. layers, hidden: of what was run.
    stored: bytes of the checkpoint. random: it was too large, so a random one was run."""

    error: float
    fault: Fault | None
    compared: int
    tokens: tuple[int, ...]  # of each dp group
    layers: int
    hidden: int
    stored: int
    random: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"fault": self.fault and self.fault._asdict()})

    @staticmethod
    def from_json(text: str) -> Verdict:
        found = json.loads(text)
        fault = found["fault"]
        if fault is not None:
            found["fault"] = Fault(**fault | {"ranks": tuple(fault["ranks"])})
        return Verdict(**found | {"tokens": tuple(found["tokens"])})


def make_trial(
    prepared: Prepared, prompt: Prompt | None, layers: int | None, max_bytes: int
) -> Trial:
    """Raises RequestError for the prompt, PlanError for the number of layers."""
    spec = prepared.spec
    if layers is not None and not 1 <= layers <= spec.num_hidden_layers:
        raise PlanError(
            f"`--layers {layers}` of a model that has {spec.num_hidden_layers}",
            f"give a number from 1 to {spec.num_hidden_layers}",
        )
    if prompt is None:
        count = min(TOKENS, spec.max_position_embeddings - 1)
        prompt = [(7919 * place + 11) % spec.vocab_size for place in range(1, count + 1)]
    positions = spec.max_position_embeddings - 1  # one more is decoded
    tokenizer = open_tokenizer(prepared.folder)
    model = Model(prepared.folder, tokenizer, spec.vocab_size, positions, positions)
    return Trial(check_prompts([prompt], model)[0], layers, max_bytes)
