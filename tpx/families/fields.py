"""Reads config.json's values with their types checked; each error names the key and the file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import CheckpointError, or_list

Config = Mapping[str, Any]
WHOLE_FOLDER = "give the folder of a whole checkpoint, with its own `config.json`"


def value(config: Config, key: str, inside: str = "") -> Any:
    """config[key]; `inside` names the object that holds it, for messages."""
    if config.get(key) is None:
        where = f" in `{inside}`" if inside else ""
        raise CheckpointError(f"`config.json` has no `{key}`{where}", WHOLE_FOLDER)
    return config[key]


def ill_typed(key: str, found: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"`config.json` has `{key}` = `{found}`, which is not {wanted}", WHOLE_FOLDER
    )


def integer(config: Config, key: str, default: int | None = None, inside: str = "") -> int:
    """A whole number of 1 or more; `default` where the key is absent or null."""
    if default is not None and config.get(key) is None:
        return default
    found = value(config, key, inside)
    if type(found) is not int or found < 1:
        raise ill_typed(key, found, "a whole number of 1 or more")
    return found


def number(config: Config, key: str, default: float | None = None, inside: str = "") -> float:
    """A finite number above 0; `default` where the key is absent or null."""
    if default is not None and config.get(key) is None:
        return default
    found = value(config, key, inside)
    if type(found) not in (int, float) or not math.isfinite(found) or found <= 0:
        raise ill_typed(key, found, "a number above 0")
    return float(found)


def flag(config: Config, key: str, default: bool) -> bool:
    found = config.get(key)
    if found is None:
        return default
    if type(found) is not bool:
        raise ill_typed(key, found, "`true` or `false`")
    return found


def word(config: Config, key: str, choices: Collection[str], default: str | None = None) -> str:
    if default is not None and config.get(key) is None:
        return default
    found = value(config, key)
    if not isinstance(found, str) or found not in choices:
        raise ill_typed(key, found, or_list(choices))
    return found


def ids(config: Config, key: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    found = config.get(key)
    if found is None:
        return ()
    listed = found if isinstance(found, list) else [found]
    if any(type(token) is not int or token < 0 for token in listed):
        raise ill_typed(key, found, "a token id or a list of token ids")
    return tuple(listed)
