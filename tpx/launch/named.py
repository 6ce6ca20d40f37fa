"""The model and the plan of a command that cannot do without them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from ..errors import PlanError
from .options import Options


def named(options: Options, usage: str, environ: Mapping[str, str] | None = None) -> Options:
    """With what the variables name, where the options do not; the plan is else `auto`. usage: what
    to type. Raises PlanError where no model is named."""
    environ = os.environ if environ is None else environ
    model = options.model or environ.get("TPX_MODEL")
    if not model:
        raise PlanError("there is no model to generate text with", f"type `{usage}`")
    tp_plan = options.tp_plan or environ.get("TPX_TP_PLAN") or "auto"
    return replace(options, model=model, tp_plan=tp_plan)
