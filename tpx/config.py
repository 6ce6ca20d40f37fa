"""Reads a checkpoint folder's JSON configuration. Knows no model family."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import open_file, read

MOST_BYTES = 10_000_000
WHAT_IT_IS = (
    "give the folder of a checkpoint as Hugging Face stores it: "
    "`config.json` beside `*.safetensors` and `tokenizer.json`"
)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict. Raises CheckpointError where it is missing or no JSON object."""
    found = _read(folder / "config.json")
    if found is None:
        raise CheckpointError(f"folder `{folder}` has no `config.json`", WHAT_IT_IS)
    return found


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json as a dict, empty where there is none."""
    return _read(folder / "generation_config.json") or {}


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is nothing of this name."""
    with suppress(OSError):  # of which opening it says more
        if path.name not in os.listdir(path.parent):
            return None
    with open_file(path, str(path)) as file:
        data = read(file, MOST_BYTES + 1, str(path))
    if len(data) > MOST_BYTES:
        raise CheckpointError(f"`{path}` has more than {MOST_BYTES} bytes", WHAT_IT_IS)
    try:
        found = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"`{path}` is not JSON: byte {error.start} is not UTF-8", WHAT_IT_IS
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"`{path}` is not JSON: line {error.lineno}: {error.msg}", WHAT_IT_IS
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"`{path}` is nested too deep to be a config", WHAT_IT_IS) from error
    except ValueError as error:  # an integer too long to convert
        raise CheckpointError(f"`{path}` is not JSON: {error}", WHAT_IT_IS) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"`{path}` holds no JSON object", WHAT_IT_IS)
    return found
