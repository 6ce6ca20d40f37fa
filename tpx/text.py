"""Text to token ids and back: tokenizer.json, chat template, text that arrives token by token.

Knows no model. A chat template is foreign code, so it runs in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from .errors import CheckpointError, RequestError

UNKNOWN = "\ufffd"  # what decoding makes of bytes that are no whole character
UNKNOWN_BYTES = "ï¿½"  # the same character's three bytes, as a byte-level vocabulary writes them
Message = dict[str, Any]


class Tokenizer:
    """The checkpoint's tokenizer.json. `folder` is where its chat template is looked up."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            found = json.loads(text)
        except (OSError, ValueError) as error:
            raise broken(path, str(error)) from error
        if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
            raise broken(path, "it names no model")
        self.tokenizer = tokenizers.Tokenizer.from_str(text)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """special: adds what the tokenizer puts around a text, such as a first token."""
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens say nothing."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> str:
        """The vocabulary's own spelling of the tokens."""
        return "".join(self.tokenizer.id_to_token(token) or "" for token in ids)

    def chat(self, messages: Sequence[Message], **values: Any) -> list[int]:
        """The ids of a conversation [{"role": ..., "content": ...}] that the model is to answer."""
        return self.encode(render_chat(self.folder, messages, **values), special=False)


def broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"`{path}` is no tokenizer: {why}", "fetch it again, or give prompts as lists of token ids"
    )


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None where it has none: token ids work without."""
    return Tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def render_chat(folder: Path, messages: Sequence[Message], **values: Any) -> str:
    """The checkpoint's chat template over the messages. Raises RequestError."""
    template, tokens = chat_template(folder)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=strftime_now)
    context = {"add_generation_prompt": True, **tokens, **values}
    try:
        return environment.from_string(template).render(messages=list(messages), **context)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise RequestError(
            f"the chat template of `{folder}` refuses the messages: {error}",
            'write messages as `[{"role": "user", "content": "..."}]`',
        ) from error


def chat_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The template, and the special tokens that it may name (`bos_token`, `eos_token`, ...)."""
    config, path = {}, folder / "tokenizer_config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"`{path}` is not JSON: {error}", "fetch it again") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str):
        raise RequestError(
            f"`{folder}` has no chat template",
            "give raw text, or put the model's `chat_template.jinja` into the folder",
        )
    return template, special_tokens(config)


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """jinja2's own filter escapes HTML, which no chat is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class TextStream:
    """The text of tokens that arrive one by one: whole characters, up to a stop string.

    The pieces joined are `text`. What may turn out to be the start of a stop string, or of a
    character, is held back until it is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.text = ""
        self.stopped = False
        self._ids: list[int] = []  # decoded together: a token's text may depend on the one before
        self._known = 0  # tokens at the front of _ids whose text is out already
        self._taken = 0  # characters of _ids' text that are out
        self._held = ""  # characters that may begin a stop string

    def push(self, token: int) -> str:
        """The next piece, possibly "". After a stop string `stopped` is set and nothing follows."""
        assert not self.stopped
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        whole = text.rstrip(UNKNOWN)
        fresh = whole[self._taken :]
        self._taken = max(self._taken, len(whole))
        if whole == text:
            self._ids = self._ids[self._known :]
            self._known = len(self._ids)
            self._taken = len(self.tokenizer.decode(self._ids))
        return self._emit(fresh)

    def finish(self) -> str:
        """What was held back; a character that never became whole is dropped."""
        if self.stopped:
            return ""
        rest = self.tokenizer.decode(self._ids)[self._taken :]
        if rest.endswith(UNKNOWN) and not self._means_unknown():
            rest = rest[:-1]
        return self._emit(rest, last=True)

    def _means_unknown(self) -> bool:
        """Whether the last token really says U+FFFD, and is no cut character."""
        return self.tokenizer.pieces(self._ids[-3:]).endswith((UNKNOWN, UNKNOWN_BYTES))

    def _emit(self, fresh: str, last: bool = False) -> str:
        text = self._held + fresh
        found = [at for at in map(text.find, self.stop) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - (0 if last else held_back(text, self.stop))
        self._held = "" if found or last else text[end:]
        self.text += text[:end]
        return text[:end]


def held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(word) - 1 for word in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop):
            return length
    return 0
