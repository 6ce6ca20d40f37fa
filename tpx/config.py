"""Reads a checkpoint folder's JSON configuration. Knows no model family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError

WHAT_IT_IS = (
    "give the folder of a checkpoint as Hugging Face stores it: "
    "`config.json` beside `*.safetensors` and `tokenizer.json`"
)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict. Raises CheckpointError where it is missing or no JSON object."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"folder `{folder}` has no `config.json`", WHAT_IT_IS)
    return _read(folder / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json as a dict, empty where there is none."""
    path = folder / "generation_config.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
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
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"`{path}` holds no JSON object", WHAT_IT_IS)
    return found
