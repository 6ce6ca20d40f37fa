"""What was asked for: `use_kernels`, TPX_KERNELS or `--kernels`, checked, as one value.

As text, in any order: `hub,attention=owner/name@2,lockfile=kernels.lock,trust_remote_code`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError, did_you_mean
from .operations import OPERATIONS, PUBLISHER

BEST = "true"  # local, else what the Hub's cache holds, else off
WORDS = (BEST, "local", "hub", "off")
KEYS = ("default", *OPERATIONS, "lockfile", "trust_remote_code")
REPO = re.compile(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
HINT = 'give True, False, "local", "hub", "off", or `{"attention": "owner/name@1"}`'


@dataclass(frozen=True, slots=True)
class Wanted:
    """sources: of each operation one of WORDS, or `owner/name@VERSION`, a kernel of the Hub.

    lockfile: where `kernels lock` has written the commits. trusts: code of the named repositories
    may run, whoever publishes it.
    """

    sources: Mapping[str, str]
    lockfile: str | None = None
    trusts: bool = False


def read_wanted(value: object, name: str = "use_kernels") -> Wanted:
    """value: True (as None), False, text, or a dict: an operation's name -> a word of WORDS, a
    bool or `owner/name@VERSION`; `default` for all others. Raises RequestError; name: what it calls
    the value."""
    given = read_parts(value, name)
    for key in given:
        if key not in KEYS:
            raise RequestError(f"`{name}` knows no `{key}`", did_you_mean(key, KEYS))
    trusts = read_trust(given.get("trust_remote_code"))
    default = read_word(given.get("default", BEST), name)
    sources = {
        operation: read_source(operation, given[operation]) if operation in given else default
        for operation in OPERATIONS
    }
    for operation, source in sources.items():
        publisher = source.partition("/")[0]
        if source not in WORDS and publisher != PUBLISHER and not trusts:
            raise RequestError(
                f"`{operation}={source}` would run code that `{publisher}` publishes",
                "add `trust_remote_code` if you trust it: "
                f'`"{operation}={source},trust_remote_code"`',
            )
    return Wanted(sources, read_lockfile(given.get("lockfile")), trusts)


def read_parts(value: object, name: str) -> dict[str, object]:
    if value is None or isinstance(value, bool):
        return {"default": value is not False}
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}
    if not isinstance(value, str):
        raise RequestError(f"`{name}` is `{value!r}`", HINT)
    found: dict[str, object] = {}
    for part in value.split(","):
        key, equals, one = part.strip().partition("=")
        if not equals:
            key, one = (key, BEST) if key == "trust_remote_code" else ("default", key)
        if key in found:
            raise RequestError(f"`{name}` is `{value}`, which says `{key}` twice", HINT)
        found[key] = one
    return found


def read_word(value: object, name: str) -> str:
    word = as_word(value)
    if word not in WORDS:
        raise RequestError(f"`{name}` is `{value}`", HINT)
    return word


def read_source(operation: str, value: object) -> str:
    """One of WORDS, or a repository of the Hub with the version, 1 where none is named."""
    word = as_word(value)
    if word in WORDS:
        return word
    found = REPO.fullmatch(word)
    if found is None:
        raise RequestError(
            f"`{operation}` is `{value}`",
            f"use `local`, `hub`, `off`, or a kernel of the Hub: `{operation}=owner/name@1`",
        )
    return word if found[2] else f"{word}@1"


def as_word(value: object) -> str:
    if isinstance(value, bool):
        return BEST if value else "off"
    return "off" if value == "false" else str(value)


def read_trust(value: object) -> bool:
    if value not in (None, True, False, "true", "false"):
        raise RequestError(f"`trust_remote_code` is `{value}`", "give True, or leave it out")
    return value in (True, "true")


def read_lockfile(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not Path(value).is_file():
        raise RequestError(
            f"lock file `{value}` does not exist", "`kernels lock` writes one: `kernels.lock`"
        )
    return str(value)
