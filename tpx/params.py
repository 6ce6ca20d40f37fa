"""SamplingParams: how a request is continued, checked where it is written down.

Knows no prompt, no model and no torch.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from .errors import RequestError, did_you_mean

MAX_SEED = 2**64 - 1
# Words from other libraries, and what says the same here.
FOREIGN = {
    "max_new_tokens": "write `max_tokens`",
    "max_length": "write `max_tokens`, which counts the new tokens only",
    "do_sample": "`temperature=0` is greedy, and any other temperature samples",
    "stop_strings": "write `stop`",
    "stop_sequences": "write `stop`",
    "stop_token_ids": "stop tokens are `eos_token_id` of the checkpoint's generation_config.json",
    "eos_token_id": "stop tokens are `eos_token_id` of the checkpoint's generation_config.json",
    "num_return_sequences": "write `n`",
    "best_of": "write `n`, and choose by `logprobs`",
    "top_logprobs": "write `logprobs`",
    "num_beams": "there is no beam search; `temperature=0` is greedy",
}


@dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """How to continue a prompt.

    temperature: 0 is greedy. top_p: keeps the smallest set of likeliest tokens that reaches this
    probability. top_k: keeps that many likeliest tokens; 0 keeps all. max_tokens: new tokens at
    most. seed: equal seeds draw equally; None takes a fresh one. stop: texts that end the result,
    and are no part of it. ignore_eos: goes on after a stop token. logprobs: how many of the
    likeliest tokens to report beside each token; 0 reports the token drawn alone, None nothing. n:
    continuations of the prompt, the i-th with seed + i. Raises RequestError.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None
    n: int

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens: int = 32,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        n: int = 1,
        **unknown: object,
    ):
        for word in unknown:
            known = [field.name for field in fields(SamplingParams)]
            hint = FOREIGN.get(word) or did_you_mean(word, known)
            raise RequestError(f"`SamplingParams` knows no `{word}`", hint)
        put = object.__setattr__
        put(self, "temperature", check_temperature(temperature))
        put(self, "top_p", check_top_p(top_p))
        put(self, "top_k", check_whole("top_k", top_k, 0, "0 keeps every token"))
        hint = "say how many tokens to write, such as `max_tokens=32`"
        put(self, "max_tokens", check_whole("max_tokens", max_tokens, 1, hint))
        put(self, "seed", check_seed(seed))
        put(self, "stop", check_stop(stop))
        put(self, "ignore_eos", check_bool("ignore_eos", ignore_eos))
        hint = "0 reports the token drawn alone, None nothing"
        wanted = None if logprobs is None else check_whole("logprobs", logprobs, 0, hint)
        put(self, "logprobs", wanted)
        put(self, "n", check_whole("n", n, 1, "say how many continuations to write"))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue, text or token ids. id: given back with its result; None numbers the
    requests from 0 on."""

    prompt: str | Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    id: str | int | None = None


def is_whole(value: object) -> bool:
    """An integer of Python or numpy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_temperature(value: float) -> float:
    if not is_number(value) or not 0 <= value < math.inf:
        raise RequestError(
            f"`temperature` is `{value!r}`, and must be a number from 0 up",
            "0 picks the likeliest token, 1 draws from the model's own distribution",
        )
    return float(value)


def check_top_p(value: float) -> float:
    if not is_number(value) or not 0 < value <= 1:
        raise RequestError(
            f"`top_p` is `{value!r}`, and must be a number above 0 and at most 1",
            "1 keeps every token",
        )
    return float(value)


def check_whole(name: str, value: int, least: int, hint: str) -> int:
    if not is_whole(value) or value < least:
        raise RequestError(
            f"`{name}` is `{value!r}`, and must be a whole number from {least} up", hint
        )
    return int(value)


def check_seed(value: int | None) -> int | None:
    if value is None:
        return None
    if not is_whole(value) or not 0 <= value <= MAX_SEED:
        raise RequestError(
            f"`seed` is `{value!r}`, and must be a whole number from 0 to 2**64 - 1",
            "leave it out for a fresh seed each time",
        )
    return int(value)


def check_stop(value: str | Iterable[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, Iterable) and not isinstance(texts, bytes):
        texts = tuple(texts)
        if all(isinstance(text, str) and text for text in texts):
            return texts
    raise RequestError(
        f"`stop` is `{value!r}`, and must be a text or a list of texts, none of them empty",
        'write `stop="END"` or `stop=["END", "\\n\\n"]`',
    )


def check_bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"`{name}` is `{value!r}`, and must be True or False", None)
    return value
