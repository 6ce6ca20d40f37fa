"""tpx: plan, shard, launch and run Mixture-of-Experts language models over many GPUs.

Names are loaded when they are first used, so that `import tpx` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .async_engine import AsyncEngine
    from .errors import CheckpointError, LaunchError, PlanError, RequestError, TpxError
    from .llm import LLM
    from .params import Request, SamplingParams
    from .results import Completion, Piece, Result

__all__ = [
    "LLM",
    "AsyncEngine",
    "CheckpointError",
    "Completion",
    "LaunchError",
    "Piece",
    "PlanError",
    "Request",
    "RequestError",
    "Result",
    "SamplingParams",
    "TpxError",
    "__version__",
]

_HOMES = {
    "LLM": "llm",
    "AsyncEngine": "async_engine",
    "Completion": "results",
    "Piece": "results",
    "Request": "params",
    "Result": "results",
    "SamplingParams": "params",
    "CheckpointError": "errors",
    "LaunchError": "errors",
    "PlanError": "errors",
    "RequestError": "errors",
    "TpxError": "errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module `tpx` has no attribute `{name}`")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
