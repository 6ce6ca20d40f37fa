"""The arguments of LLM, checked: its own, and the words that people bring from other libraries.

Knows no tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .agree import Said, digest
from .engine.start import REQUESTS, Wanted
from .errors import RequestError, did_you_mean
from .hub import AUTO, DOWNLOADS
from .kernels import Device, Loaded, choose, load, read_wanted
from .params import check_bool, check_whole, is_number
from .plan.prepare import Prepared, prepare
from .version import __version__
from .worker import setting

WORDS = ("tp_plan", "dtype", "device", "revision", "download", "use_kernels", "context", "batch",
         "memory_fraction", "prefix_cache", "graphs")  # fmt: skip
DTYPES = ("auto", "bfloat16", "float16", "float32")
PLACEMENT = 'a plan says what each rank holds: `tp_plan="auto"`, or a plan\'s name or path'
RANKS = "start one process a GPU: `tpx launch --nproc N SCRIPT`, and name the cut in `tp_plan`"
STORED = "weights stay as the checkpoint stores them (MXFP4 or bfloat16); leave it out"
FOREIGN = {
    "device_map": PLACEMENT,
    "max_memory": f"{PLACEMENT}; `limits: {{memory: ...}}` in a plan bounds a rank",
    "offload_folder": PLACEMENT,
    "distributed_config": PLACEMENT,
    "device_mesh": PLACEMENT,
    "tp_size": RANKS,
    "tensor_parallel_size": RANKS,
    "data_parallel_size": RANKS,
    "pipeline_parallel_size": RANKS,
    "enable_expert_parallel": RANKS,
    "torch_dtype": "write `dtype`",
    "load_in_4bit": STORED,
    "load_in_8bit": STORED,
    "quantization": STORED,
    "quantization_config": STORED,
    "attn_implementation": "there is one attention for each device; leave it out",
    "trust_remote_code": "no code of a checkpoint is run; leave it out",
    "low_cpu_mem_usage": "each rank reads its own shards only; leave it out",
    "gpu_memory_utilization": "write `memory_fraction`",
    "max_model_len": "write `context`",
    "max_num_seqs": "write `batch`",
    "enable_prefix_caching": "write `prefix_cache`",
    "enforce_eager": "write `graphs=False`",
    "tokenizer": "the checkpoint's own `tokenizer.json` is used; leave it out",
    "token": "log in with `hf auth login`, or set HF_TOKEN",
    "cache_dir": "set HF_HUB_CACHE",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "model": "give the folder or Hub id first: `tpx.LLM(PATH_OR_HUB_ID)`",
}


class EngineArguments(NamedTuple):
    """As they were given; None where they were left out."""

    context: object = None
    batch: object = None
    memory_fraction: object = None
    prefix_cache: object = True
    graphs: object = True


class Arguments(NamedTuple):
    """As they were given; None where they were left out."""

    model: object
    tp_plan: object
    dtype: object
    revision: object
    download: object = None
    engine: EngineArguments = EngineArguments()


class Ready(NamedTuple):
    """dtype: its name."""

    prepared: Prepared
    dtype: str
    engine: Wanted


def prepare_arguments(given: Arguments, world: int) -> tuple[Ready, dict[str, Said]]:
    """What the arguments mean; and what all ranks must have alike.

    Raises RequestError, PlanError and CheckpointError.
    """
    revision = check_text("revision", given.revision)
    download = check_download(given.download)
    dtype = check_dtype(given.dtype)
    check_engine(given.engine)
    model = check_model(setting(given.model, "TPX_MODEL"))
    tp_plan = check_plan(setting(given.tp_plan, "TPX_TP_PLAN", "auto"))
    prepared = prepare(model, tp_plan, world, revision, download=download)
    dtype = prepared.spec.dtype if dtype == "auto" else dtype
    engine = engine_wanted(given.engine, prepared)
    files = [prepared.index.header_digest, prepared.config, prepared.generation_config]
    said = {
        "versions of tpx": Said(__version__, __version__),
        "checkpoints": Said(digest(files), str(prepared.folder)),
        "plans": Said(digest(prepared.text), prepared.plan.path),
        "dtypes": Said(dtype, dtype),
        "sizes of the engine": Said(digest(engine), str(engine)),
    }
    return Ready(prepared, dtype, engine), said


def check_engine(given: EngineArguments) -> None:
    for name in ("context", "batch"):
        value: Any = getattr(given, name)
        if value is not None:
            check_whole(name, value, 1, f"leave it out, or write `{name}=16`")
    share: Any = given.memory_fraction
    if share is not None and (not is_number(share) or not 0 < share <= 1):
        raise RequestError(
            f"`memory_fraction` is `{share!r}`, and must be a number above 0 and at most 1",
            "leave it out, or write `memory_fraction=0.9`",
        )
    for name in ("prefix_cache", "graphs"):
        check_bool(name, getattr(given, name))


def engine_wanted(given: EngineArguments, prepared: Prepared) -> Wanted:
    """Raises RequestError where the model has fewer positions than `context`."""
    limits, positions = prepared.plan.limits, prepared.spec.max_position_embeddings
    asked: Any = given.context
    if asked is not None and asked > positions:
        raise RequestError(
            f"`context` is `{asked}`, and the model has `{positions}` positions",
            f"write at most `context={positions}`",
        )
    context = asked or min(limits.context or positions, positions)
    batch: Any = given.batch or limits.batch
    requests = REQUESTS if batch is None else -(-batch // prepared.plan.mesh.dp)
    _, _, share, *switches = given
    return Wanted(int(context), int(requests), share, *switches)  # type: ignore[arg-type]


def prepare_kernels(use_kernels: object, device: Device) -> tuple[Loaded, dict[str, Said]]:
    """The kernels that run on this rank's device; all ranks must have them alike.

    Raises RequestError.
    """
    wanted = read_wanted(setting(use_kernels, "TPX_KERNELS"))
    loaded = load(choose(wanted, device))
    alike = {choice.operation: list(choice[1:4]) for choice in loaded.chosen.choices}
    sources = ", ".join(dict.fromkeys(choice.source for choice in loaded.chosen.choices))
    return loaded, {"kernels": Said(digest(alike), sources)}


def refuse_unknown(unknown: Iterable[str]) -> None:
    for word in unknown:
        hint = FOREIGN.get(word) or did_you_mean(word, WORDS)
        raise RequestError(f"`LLM` knows no `{word}`", hint)


def check_model(model: object) -> str:
    """A folder or Hub id."""
    if model is None:
        raise RequestError("no model is named", "write `tpx.LLM(PATH_OR_HUB_ID)`, or set TPX_MODEL")
    if not isinstance(model, str | os.PathLike) or not str(model):
        raise RequestError(
            f"the model is `{model!r}`, not a folder or a Hub id",
            "write `tpx.LLM(PATH_OR_HUB_ID)`",
        )
    return str(model)


def check_plan(tp_plan: object) -> str | dict[str, Any]:
    if isinstance(tp_plan, Mapping):
        return dict(tp_plan)
    if isinstance(tp_plan, str | os.PathLike) and str(tp_plan):
        return str(tp_plan)
    raise RequestError(
        f"`tp_plan` is `{tp_plan!r}`",
        "give \"auto\", a path, a shipped plan's name, or a dict in Hugging Face's form",
    )


def check_dtype(dtype: object) -> str:
    """One of DTYPES; torch's own dtypes are taken too. None is "auto": the checkpoint's."""
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError(f"`dtype` is `{dtype}`", did_you_mean(name, DTYPES))
    return name


def check_download(download: object) -> str:
    """One of DOWNLOADS. None is "auto"."""
    name = AUTO if download is None else str(download)
    if name not in DOWNLOADS:
        raise RequestError(f"`download` is `{download}`", did_you_mean(name, DOWNLOADS))
    return name


def check_text(name: str, value: object) -> str | None:
    """revision and device: text, or left out."""
    if value is not None and not isinstance(value, str):
        raise RequestError(f"`{name}` is `{value!r}`, not text", f'write `{name}="..."`')
    return value
