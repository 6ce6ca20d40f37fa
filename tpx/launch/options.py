"""What `tpx launch` was asked for, and how each value is read from text.

Knows the meaning of a single value; what fits the machine and the model is checked in preflight.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import PlanError, or_list
from ..kernels import read_wanted

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Options:
    """A parsed command line; None: not given. target: a script, with `module` a module's name."""

    nproc: str = "auto"
    device: str | None = None
    nnodes: str = "1"
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    rdzv_backend: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    rdzv_conf: str = ""
    local_addr: str | None = None
    standalone: bool = False
    max_restarts: int = 0
    shutdown_timeout: int = 3  # seconds
    hang_timeout: int = 120  # seconds, 0 for never
    prefix: str = "auto"  # or always, never: see logs.views
    model: str | None = None
    tp_plan: str | None = None
    revision: str | None = None
    download: str | None = None  # one of hub.DOWNLOADS, or hub.HEADERS
    kernels: str | None = None  # see kernels.read_wanted
    dtype: str | None = None
    prompt: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    context: int | None = None
    batch: int | None = None
    memory_fraction: float | None = None
    run_dir: str | None = None
    preflight: str = "strict"  # one of checks.MODES
    dry_run: bool = False
    world: int | None = None  # with dry_run: ranks on hardware that is elsewhere
    slurm: bool = False
    recipe: str | None = None
    hardware: str | None = None  # the recipe's
    environment: tuple[tuple[str, str], ...] = ()  # the recipe's
    traceback: bool = False
    target: str | None = None
    module: bool = False
    args: tuple[str, ...] = ()


def whole(least: int) -> Callable[[str, str], int]:
    """A reader of whole numbers from `least` up."""

    def read(flag: str, text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise PlanError(f"`{flag} {text}` is no whole number from {least} up")
        return int(text)

    return read


def number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PlanError(f"`{flag} {text}` is no number") from None


def words(*choices: str) -> Callable[[str, str], str]:
    """A reader of one word of a few."""

    def read(flag: str, text: str) -> str:
        if text not in choices:
            raise PlanError(f"`{flag} {text}` is unknown", f"use {or_list(choices)}")
        return text

    return read


def text(flag: str, value: str) -> str:
    if not value:
        raise PlanError(f"`{flag}` is empty", "give it a value, or leave it out")
    return value


def nproc(flag: str, value: str) -> str:
    """A number, or a word that devices.py turns into one; torchrun's `gpu` is every GPU."""
    if value not in ("auto", "gpu") and (not value.isdecimal() or int(value) < 1):
        raise PlanError(
            f"`{flag} {value}` is no number of ranks",
            "give a whole number from 1 up, or `auto`: one rank a GPU, two on CPU",
        )
    return value


def nnodes(flag: str, value: str) -> str:
    least, _, most = value.partition(":")
    if all(part.isdecimal() for part in (least, most or "1")) and 1 <= int(least) <= int(
        most or least
    ):
        return value
    raise PlanError(f"`{flag} {value}` is no number of nodes", "give `N`, or `MIN:MAX`")


def port(flag: str, value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= 65535:
        raise PlanError(f"`{flag} {value}` is no port", "give a number from 1 to 65535")
    return int(value)


def kernels(flag: str, value: str) -> str:
    read_wanted(value, flag)
    return value


def rdzv_conf(flag: str, value: str) -> str:
    if any("=" not in pair for pair in value.split(",") if pair):
        raise PlanError(f"`{flag} {value}` cannot be read", "write `key=value,key=value`")
    return value
