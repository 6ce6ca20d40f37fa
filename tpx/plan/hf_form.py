"""Hugging Face's form as a value: the dicts and sizes of transformers' DistributedConfig (5.23).

Reads it from JSON: such a config, a `tp_plan` alone, or a config.json that brings its own plans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import PlanError, or_list

# Their ep_implementation -> `dispatch`.
DISPATCH = {"auto": "auto", "all_reduce": "replicated", "all_to_all": "all_to_all"}
# Fields of theirs that have no equal here, with the values that say nothing.
SILENT: dict[str, tuple[object, ...]] = {
    "fsdp_size": (None, 1),
    "dp_replicate_size": (None, 1),
    "pp_size": (None, 1),
    "fsdp_plan": (None, {}),
    "fsdp_cpu_offload": (None, False),
    "fsdp_mixed_precision": (None, False),
    "enable_sequence_parallel": (None, False),
    "enable_expert_parallel": (None, False),
}
FIELDS = ("tp_plan", "ep_plan", "tp_size", "ep_size", "ep_implementation", *SILENT)
IN_CONFIG = {"tp_plan": "base_model_tp_plan", "ep_plan": "base_model_ep_plan"}


class HfForm(NamedTuple):
    """What DistributedConfig is given; None: not said. ep_plan holds where ep_size is over 1."""

    tp_plan: Mapping[str, str]
    ep_plan: Mapping[str, str]
    tp_size: int | None = None
    ep_size: int | None = None
    ep_implementation: str = "auto"

    def as_dict(self) -> dict[str, Any]:
        """Only what applies: without its experts' fields where no expert is cut."""
        found: dict[str, Any] = {"tp_size": self.tp_size, "tp_plan": dict(self.tp_plan)}
        if self.ep_plan:
            found |= {"ep_size": self.ep_size, "ep_plan": dict(self.ep_plan)}
            found["ep_implementation"] = self.ep_implementation
        return found

    def as_code(self) -> str:
        """A call of DistributedConfig."""
        lines = ["from transformers.distributed import DistributedConfig", ""]
        lines.append("distributed_config = DistributedConfig(")
        for name, value in self.as_dict().items():
            if isinstance(value, dict) and value:
                inside = (f"        {json.dumps(k)}: {json.dumps(v)}," for k, v in value.items())
                lines += [f"    {name}={{", *inside, "    },"]
            else:
                lines.append(f"    {name}={json.dumps(value)},")
        return "\n".join([*lines, ")"]) + "\n"


def read_form(path: Path) -> HfForm:
    """What a file says. Raises PlanError."""
    name = str(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise PlanError(
            f"file `{name}` cannot be read: {error.strerror}", "give a file of JSON"
        ) from error
    except UnicodeDecodeError as error:
        raise _no_json(name, f"byte {error.start} is not UTF-8") from error
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, name))
    except json.JSONDecodeError as error:
        raise _no_json(name, f"line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise _no_json(name, "it is nested too deep") from error
    if not isinstance(found, dict):
        raise _no_json(name, "it holds no object")
    if "model_type" in found or any(key in found for key in IN_CONFIG.values()):
        return form_of_config(found, name)
    if any(key in found for key in FIELDS):
        return form_of(found, name)
    return HfForm(_plan(found, "tp_plan", name), {})


def _once(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PlanError(f"`{name}` has the key `{key}` twice", "delete one of the two")
        found[key] = value
    return found


def _no_json(name: str, why: str) -> PlanError:
    return PlanError(
        f"`{name}` is not JSON: {why}", 'write it as `{"model.layers.*.self_attn.q_proj": ...}`'
    )


def form_of_config(config: Mapping[str, Any], name: str) -> HfForm:
    """The plans that a config.json brings. Raises PlanError where it has none."""
    tp, ep = (config.get(key) for key in IN_CONFIG.values())
    if tp is None and ep is None:
        raise PlanError(
            f"`{name}` has neither `base_model_tp_plan` nor `base_model_ep_plan`",
            "transformers keeps them in its config class: write that dict to a JSON file, and "
            "give the file",
        )
    tp_plan = _plan({} if tp is None else tp, IN_CONFIG["tp_plan"], name)
    return HfForm(tp_plan, _plan({} if ep is None else ep, IN_CONFIG["ep_plan"], name))


def form_of(found: Mapping[str, Any], name: str) -> HfForm:
    """The fields of a DistributedConfig, as its to_dict gives them. Raises PlanError."""
    for key, value in found.items():
        if key not in FIELDS:
            raise PlanError(f"`{name}` has `{key}`, which is no field of a DistributedConfig",
                            f"use {or_list(FIELDS[:5])}")  # fmt: skip
        if key in SILENT and value not in SILENT[key]:
            raise PlanError(
                f"`{name}`: `{key}` is `{json.dumps(value)}`, which has no equal here",
                "leave it out: tensor and expert parallelism alone are imported",
            )
    tp_size, ep_size = (_size(found.get(key), key, name) for key in ("tp_size", "ep_size"))
    if ep_size is not None and ep_size > 1 and ep_size != (tp_size or ep_size):
        raise PlanError(
            f"`{name}`: `ep_size` {ep_size} beside `tp_size` {tp_size} deals experts over ranks "
            "that also shard the dense part (FSDP), which has no equal here",
            f"use `ep_size` {tp_size}, or write a plan with dp",
        )
    word = found.get("ep_implementation") or "auto"
    if word not in DISPATCH:
        raise PlanError(f"`{name}`: `ep_implementation` is `{word}`, which has no equal here",
                        f"use {or_list(DISPATCH)}")  # fmt: skip
    tp_plan = _plan(found.get("tp_plan") or {}, "tp_plan", name)
    ep_plan = _plan(found.get("ep_plan") or {}, "ep_plan", name)
    return HfForm(tp_plan, ep_plan, tp_size, ep_size, word)


def _size(value: object, key: str, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(
            f"`{name}`: `{key}` is `{json.dumps(value)}`, not a number of ranks", "write it as `2`"
        )
    return value


def _plan(found: object, key: str, name: str) -> dict[str, str]:
    if not isinstance(found, dict):
        raise PlanError(
            f"`{name}`: `{key}` is `{json.dumps(found)}`, not an object of names and styles",
            'write it as `{"model.layers.*.self_attn.q_proj": "colwise"}`',
        )
    for pattern, style in found.items():
        if not isinstance(style, str):
            raise PlanError(
                f"`{name}`: `{key}` gives `{pattern}` the style `{json.dumps(style)}`",
                "a style is a word, such as `colwise`",
            )
    return found
