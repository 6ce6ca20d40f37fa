"""The model families tpx knows, one file each."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError, or_list
from . import gpt_oss
from .family import Family

FAMILIES: dict[str, Family] = {"gpt_oss": gpt_oss.FAMILY}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises CheckpointError for one that tpx does not run."""
    model_type = config.get("model_type")
    supported = f"tpx runs checkpoints of model_type {or_list(FAMILIES)}"
    if model_type is None:
        raise CheckpointError("`config.json` has no `model_type`", supported)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"`config.json` has model_type `{model_type}`, which is not supported", supported
        )
    return FAMILIES[model_type]
