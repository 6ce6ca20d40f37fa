"""Requests out of a file, one JSON object a line, checked where they are written down.

Knows no model and no torch: what the model says of a prompt comes later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from .errors import RequestError, did_you_mean
from .params import FOREIGN, SamplingParams, is_whole

SAMPLING = tuple(field.name for field in fields(SamplingParams))
KEYS = ("prompt", "messages", "id", *SAMPLING)
EXAMPLE = 'write a request a line, such as `{"prompt": "The"}`'
MESSAGES = 'write `"messages": [{"role": "user", "content": "..."}]`'
PROMPT = 'write `"prompt": "text"`, or token ids: `"prompt": [1, 2, 3]`'
IDS = "a line without an `id` has its line's number, from 0 on"


class Line(NamedTuple):
    """A request. number: of its line, from 1 on. Either prompt or messages is None. digest: of all
    that the line says."""

    number: int
    id: str | int
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    params: SamplingParams
    digest: str


def read_requests(path: str, defaults: Mapping[str, Any], chat: bool) -> Iterator[Line]:
    """defaults: arguments of SamplingParams that a line may change. chat: whether a text is what a
    user says. Raises RequestError, with the line's number; ids may still be there twice."""
    with open_input(path) as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                with located(path, number):
                    line = read_line(number, text, defaults, chat)
                yield line


def open_input(path: str) -> IO[bytes]:
    if Path(path).is_dir():
        raise RequestError(f"`{path}` is a folder, not a file of requests", EXAMPLE)
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise RequestError(f"there is no file `{path}`", "give a file: `--input FILE`") from None
    except OSError as error:
        raise RequestError(f"`{path}` cannot be read: {error.strerror}", None) from None


@contextmanager
def located(path: str, number: int) -> Iterator[None]:
    """What is wrong inside says where."""
    try:
        yield
    except RequestError as error:
        where = f"`{path}`, line {number}"
        raise RequestError(f"{where}: {error.message}", error.hint) from None


def read_line(number: int, text: bytes, defaults: Mapping[str, Any], chat: bool) -> Line:
    said = parse(text)
    for key in said:
        if key not in KEYS:
            raise RequestError(
                f"a request has no `{key}`", FOREIGN.get(key) or did_you_mean(key, KEYS)
            )
    name = check_id(said.get("id", number - 1))
    prompt, messages = check_content(said, chat)
    params = SamplingParams(**{**defaults, **{key: said[key] for key in SAMPLING if key in said}})
    return Line(number, name, prompt, messages, params, digest({**said, "id": name}))


def parse(text: bytes) -> dict[str, Any]:
    def refuse(word: str) -> NoReturn:
        raise RequestError(f"`{word}` is no number", None)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise RequestError(f"`{name}` is there twice", "leave one of them out")
        return dict(pairs)

    try:
        said = json.loads(text.decode(), object_pairs_hook=once, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise RequestError(f"byte {error.start} is not UTF-8", "save the file as UTF-8") from None
    except RecursionError:
        raise RequestError("the JSON is nested too deep", EXAMPLE) from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise RequestError(f"this is not JSON: {where}", EXAMPLE) from None
    except ValueError:
        raise RequestError("a number has too many digits", EXAMPLE) from None
    if not isinstance(said, dict):
        raise RequestError("this is no JSON object", EXAMPLE)
    return said


def check_id(name: object) -> str | int:
    if isinstance(name, str) or is_whole(name):
        return name  # type: ignore[return-value]
    raise RequestError(f"`id` is `{json.dumps(name)}`, neither text nor a whole number", IDS)


def check_content(
    said: Mapping[str, Any], chat: bool
) -> tuple[str | list[int] | None, list[dict[str, Any]] | None]:
    """-> the prompt, or the messages."""
    if "prompt" in said and "messages" in said:
        raise RequestError("there are both `prompt` and `messages`", "leave one of them out")
    if "messages" in said:
        return None, check_messages(said["messages"])
    if "prompt" not in said:
        raise RequestError("there is neither `prompt` nor `messages`", f"{PROMPT}, or {MESSAGES}")
    prompt = said["prompt"]
    if isinstance(prompt, str):
        return (None, [{"role": "user", "content": prompt}]) if chat else (prompt, None)
    if not isinstance(prompt, list) or not all(is_whole(token) for token in prompt):
        raise RequestError("`prompt` is neither text nor a list of token ids", PROMPT)
    if chat:
        raise RequestError(
            "`prompt` has token ids, and `--chat` is for text", "give text, or leave out `--chat`"
        )
    return prompt, None


def check_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, list) and messages:
        roles = [one.get("role") if isinstance(one, dict) else None for one in messages]
        if all(isinstance(role, str) for role in roles):
            return messages
    raise RequestError("`messages` is no list of messages, each with a `role`", MESSAGES)


def digest(said: Mapping[str, Any]) -> str:
    """16 hexadecimal digits; the same however the line is spelt. Raises RequestError where a text
    is none."""
    text = json.dumps(said, sort_keys=True, ensure_ascii=False)
    try:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RequestError(
            f"`{half}` is half a character", "write the character itself, in UTF-8"
        ) from None
