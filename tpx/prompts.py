"""What a caller asks for, checked before any work: prompts as token ids, SamplingParams a prompt.

Every mistake is a RequestError with the numbers. Knows no rank and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from .errors import RequestError
from .params import Request, SamplingParams, is_whole

Prompt = str | Sequence[int]
IDS_HINT = "a prompt is text or a list of token ids: `[[1, 2, 3]]` is one prompt of three tokens"


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


class Model(NamedTuple):
    """What prompts are checked against. positions: tokens that a sequence can have, because of
    `context` or of the model itself."""

    folder: Path
    tokenizer: Encoder | None
    vocab_size: int
    positions: int
    own: int

    @property
    def bound(self) -> str:
        if self.positions < self.own:
            return f"`context` is `{self.positions}`"
        return f"the model has `{self.positions}` positions"


def check_prompts(prompts: Sequence[Prompt], model: Model) -> list[tuple[int, ...]]:
    """The token ids of each prompt. Raises RequestError."""
    if isinstance(prompts, str):
        raise RequestError("`prompts` is one text, not a list of prompts", "write `[text]`")
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"`prompts` is a `{type(prompts).__name__}`, not a list of prompts", IDS_HINT
        )
    if not prompts:
        raise RequestError("`prompts` is empty", "give at least one prompt")
    return [
        check_prompt(prompt, f"prompt `{number}`", model) for number, prompt in enumerate(prompts)
    ]


def check_request(
    request: Request, number: int, model: Model
) -> tuple[str | int, tuple[int, ...], SamplingParams]:
    """Its name (`number`, where it has none), token ids and parameters. Raises RequestError."""
    if not isinstance(request, Request):
        raise RequestError(
            f"request `{number}` is a `{type(request).__name__}`, not a Request",
            "write `tpx.Request(prompt, tpx.SamplingParams(max_tokens=64))`",
        )
    name = number if request.id is None else request.id
    if not isinstance(name, str) and not is_whole(name):
        raise RequestError(f"`id` is `{name!r}`, neither text nor a whole number", None)
    [params] = check_params(request.params, 1, model)
    return name, check_prompt(request.prompt, f"request `{name}`", model), params


def check_prompt(prompt: Prompt, name: str, model: Model) -> tuple[int, ...]:
    """name: what messages call it."""
    ids = to_ids(prompt, name, model)
    if not ids:
        raise RequestError(f"{name} is empty", "give it at least one token")
    inside = 0 <= min(ids) and max(ids) < model.vocab_size
    for place, token in () if inside else enumerate(ids):
        if not 0 <= token < model.vocab_size:
            raise RequestError(
                f"{name} has token id `{token}` at place `{place}`, outside the "
                f"vocabulary of `{model.vocab_size}`",
                f"ids go from 0 to {model.vocab_size - 1}",
            )
    if len(ids) > model.positions:
        raise RequestError(
            f"{name} has `{len(ids)}` tokens, and {model.bound}",
            f"shorten it by {len(ids) - model.positions} or more tokens",
        )
    return ids


def to_ids(prompt: Prompt, name: str, model: Model) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise no_tokenizer(name, model.folder)
        return tuple(model.tokenizer.encode(prompt))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        kind = type(prompt).__name__
        hint = "write `tensor.tolist()`" if hasattr(prompt, "tolist") else IDS_HINT
        raise RequestError(f"{name} is a `{kind}`, not text or token ids", hint)
    if set(map(type, prompt)) <= {int}:  # long prompts are checked in no time
        return tuple(cast(Sequence[int], prompt))
    for place, token in enumerate(prompt):
        if not is_whole(token):
            raise RequestError(
                f"{name} has `{token!r}` at place `{place}`, which is no token id",
                IDS_HINT,
            )
    return tuple(int(token) for token in prompt)


def no_tokenizer(what: str, folder: Path) -> RequestError:
    return RequestError(
        f"{what} is text, and `{folder}` has no `tokenizer.json`",
        "give prompts as lists of token ids, which need no tokenizer",
    )


def check_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, model: Model
) -> list[SamplingParams]:
    """One for each of `count` prompts; None stands for SamplingParams(). Raises RequestError."""
    listed = params if isinstance(params, list | tuple) else [params or SamplingParams()] * count
    for one in listed:
        if not isinstance(one, SamplingParams):
            raise RequestError(
                f"`params` is a `{type(one).__name__}`, not SamplingParams",
                "write `tpx.SamplingParams(temperature=0.7, max_tokens=64)`",
            )
        if one.stop and model.tokenizer is None:
            raise no_tokenizer("`stop`", model.folder)
    if len(listed) != count:
        raise RequestError(
            f"there are `{count}` prompts and `{len(listed)}` SamplingParams",
            "give one SamplingParams for all prompts, or one for each",
        )
    return list(listed)
