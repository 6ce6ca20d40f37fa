"""Answer: one request's tokens as they come, and the text they make.

Joins what the engine knows (ids) with what the tokenizer knows (text). Knows no rank and no tensor.
"""

from __future__ import annotations

from .engine.request import Request
from .families.fields import ids
from .params import SamplingParams
from .plan.prepare import Prepared
from .results import Completion
from .text import TextStream, Tokenizer


class Answer:
    """A request, and its text so far; no text where there is no tokenizer."""

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None):
        self.request = request
        self.text = None if tokenizer is None else TextStream(tokenizer, params.stop)

    def hear(self, token: int) -> tuple[str, bool]:
        """The request's next token -> the next piece of text, and whether a stop string ended it.

        A stop token says nothing. Once the request has ended, the piece holds all that was kept
        back.
        """
        if self.text is None:
            return "", False
        piece = "" if token in self.request.stop_ids else self.text.push(token)
        if self.request.finish_reason is not None:
            piece += self.text.finish()
        return piece, self.text.stopped

    def completion(self) -> Completion:
        reason = self.request.finish_reason
        assert reason is not None
        text = "" if self.text is None else self.text.text
        return Completion(text, list(self.request.output), reason)


def stop_ids(prepared: Prepared) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json."""
    return frozenset(ids(prepared.generation_config, "eos_token_id") or prepared.spec.eos_token_ids)
