"""Answer: one continuation's tokens as they come, and the text they make.

Joins what the engine knows (ids) with what the tokenizer knows (text). Knows no rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .engine.engine import Drawn
from .engine.request import Request
from .families.fields import ids
from .params import SamplingParams
from .plan.prepare import Prepared
from .results import Completion, Likely
from .text import TextStream, Tokenizer


class Said(NamedTuple):
    """What a step adds."""

    text: str
    token_ids: list[int]


class Answer:
    """An engine's request, and its text so far; no text where there is no tokenizer. choice: which
    of its prompt's continuations. said: where it is streamed, what nobody has taken yet. done: set
    once all ranks know of its end."""

    def __init__(
        self, request: Request, stop: tuple[str, ...], tokenizer: Tokenizer | None, choice: int = 0
    ):
        self.request = request
        self.choice = choice
        self.text = None if tokenizer is None else TextStream(tokenizer, stop)
        self.likely = list[Likely]()
        self.logits: torch.Tensor | None = None
        self.said = list[Said]()
        self.done: Completion | None = None

    def hear(self, drawn: Drawn) -> tuple[str, bool]:
        """The request's next token -> the next piece of text, and whether a stop string ended it.

        A stop token says nothing. Once the request has ended, the piece holds all that was kept
        back.
        """
        if drawn.likely is not None:
            self.likely.append(drawn.likely)
        if self.text is None:
            return "", False
        piece = "" if drawn.token in self.request.stop_ids else self.text.push(drawn.token)
        if self.request.finish_reason is not None:
            piece += self.text.finish()
        return piece, self.text.stopped

    def take_said(self) -> list[Said]:
        said, self.said = self.said, []
        return said

    def keep(self, start: int, logits_TV: torch.Tensor) -> None:
        """Logits of the prompt's tokens from `start` on."""
        if self.logits is None:
            self.logits = torch.empty(len(self.request.prompt), logits_TV.shape[1])
        self.logits[start : start + len(logits_TV)] = logits_TV

    def completion(self) -> Completion:
        reason = self.request.finish_reason
        assert reason is not None
        text = "" if self.text is None else self.text.text
        likely = None if self.request.logprobs is None else self.likely
        return Completion(text, list(self.request.output), reason, likely)


def from_json(told: list[Any]) -> Completion:
    """Of a Completion that JSON has carried."""
    text, token_ids, reason, likely = told
    if likely is not None:
        likely = [Likely(own, tuple((token, p) for token, p in top)) for own, top in likely]
    return Completion(text, token_ids, reason, likely)


def make_request(
    prompt: tuple[int, ...],
    params: SamplingParams,
    seed: int,
    positions: int,
    stop_ids: frozenset[int],
) -> Request:
    """positions: tokens that a sequence can have."""
    return Request(
        prompt=prompt,
        limit=min(len(prompt) + params.max_tokens, positions),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=seed % 2**64,
        stop_ids=frozenset() if params.ignore_eos else stop_ids,
        logprobs=params.logprobs,
    )


def stop_ids(prepared: Prepared) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json."""
    return frozenset(ids(prepared.generation_config, "eos_token_id") or prepared.spec.eos_token_ids)
