"""What `tpx generate` checks once the model is known: that it is the one that results were made
with, and that it can continue the prompts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..hub import is_partial, read_repository
from ..plan.prepare import Prepared
from ..prompts import Model, check_params, check_prompt, no_tokenizer
from ..requests_file import Line, located
from ..text import Tokenizer, chat_template, open_tokenizer

SAMPLE = 64  # bytes of each tensor
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def model_digest(prepared: Prepared) -> str:
    """Of all that text depends on: the configuration, the tokenizer, and of the weights their
    headers and commit, or the first bytes of each tensor."""
    folder = prepared.folder
    parts = [json.dumps([prepared.config, prepared.generation_config], sort_keys=True).encode()]
    texts = (folder / name for name in TEXT_FILES)
    parts += [text.read_bytes() if text.is_file() else b"" for text in texts]
    commit = commit_of(folder)
    parts += [commit.encode()] if commit else [prepared.index.header_digest.encode()]
    parts += [] if commit else samples(prepared)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def commit_of(folder: Path) -> str | None:
    """Of a model from the Hub, of which parts may be missing."""
    if is_partial(folder):
        return read_repository(folder).commit
    return folder.name if folder.parent.name == "snapshots" else None


def samples(prepared: Prepared) -> Iterator[bytes]:
    opened: dict[str, int] = {}
    try:
        for tensor in prepared.index.tensors.values():
            if tensor.file not in opened:
                opened[tensor.file] = os.open(prepared.index.folder / tensor.file, os.O_RDONLY)
            yield os.pread(opened[tensor.file], min(SAMPLE, tensor.nbytes), tensor.offset)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def check_lines(
    path: str, lines: Iterable[Line], done: Container[str | int], prepared: Prepared
) -> None:
    """As the ranks will check those that are not done, but for the room in their caches, and for
    the template of short conversations. Raises RequestError."""
    limits, own = prepared.plan.limits, prepared.spec.max_position_embeddings
    positions = min(limits.context or own, own)
    tokenizer = open_tokenizer(prepared.folder)
    model = Model(prepared.folder, tokenizer, prepared.spec.vocab_size, positions, own)
    for line in lines:
        if line.id not in done:
            with located(path, line.number):
                check_params(line.params, 1, model)
                if line.messages is not None:
                    check_messages(line.messages, tokenizer, model)
                elif line.prompt is not None and not is_short(line.prompt, model):
                    check_prompt(line.prompt, "`prompt`", model)


def check_messages(
    messages: list[dict[str, Any]], tokenizer: Tokenizer | None, model: Model
) -> None:
    """Those that may be too long are put through the template, which takes milliseconds."""
    if tokenizer is None:
        raise no_tokenizer("`messages`", model.folder)
    chat_template(model.folder)
    if 2 * len(json.dumps(messages)) > model.positions:
        check_prompt(tokenizer.chat(messages), "`messages`", model)


def is_short(prompt: str | list[int], model: Model) -> bool:
    """Whether a text needs no tokenizer to be seen to fit: a token has a byte at least."""
    known = isinstance(prompt, str) and model.tokenizer is not None
    return known and 0 < len(str(prompt).encode()) < model.positions
