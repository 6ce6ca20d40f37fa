"""What the ranks shall run on: this machine and others like it, or hardware that is elsewhere."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import LaunchError, PlanError
from ..plan.device import CPU, DEVICES, Device, device_of
from ..plan.topology import Topology, topology_for
from .devices import smallest_gpu
from .options import Options
from .rendezvous import node_range


class Hardware(NamedTuple):
    """device: "cuda" or "cpu". nproc: ranks of a machine; nodes: machines, at least and at most.
    elsewhere: the product, where nothing of this machine is asked."""

    device: str
    nproc: int
    nodes: tuple[int, int]
    elsewhere: Device | None = None

    @property
    def world(self) -> int:
        return self.nproc * self.nodes[1]

    @property
    def topology(self) -> Topology:
        return Topology(self.nodes[1], self.nproc)


def product_here(device: str) -> Device:
    """device: "cuda" or "cpu"."""
    if device == "cpu":
        return CPU
    gpu = smallest_gpu()
    return device_of("a GPU of unknown speed") if gpu is None else device_of(gpu.name, gpu.memory)


def on_paper(options: Options) -> Hardware | None:
    """None: it is this machine. Raises PlanError."""
    if not options.dry_run:
        refuse_paper(options)
        return None
    word = options.device or options.hardware
    named = word in DEVICES and (word != "cpu" or options.world is not None)
    if options.world is None and not named:
        return None
    if word is None or word not in DEVICES:
        raise PlanError(
            f"`--world {options.world}` is for hardware that is elsewhere, and it is not named",
            "add `--device h100`, `--device h200` or `--device cpu`",
        )
    nodes, nproc = machines(options, word)
    return Hardware("cpu" if word == "cpu" else "cuda", nproc, (nodes, nodes), DEVICES[word])


def refuse_paper(options: Options) -> None:
    if options.world is not None:
        raise PlanError(
            f"`--world {options.world}` is for `--dry-run`",
            "the ranks of this machine are `--nproc`, and the machines `--nnodes`",
        )
    if options.device in DEVICES and options.device != "cpu":
        raise PlanError(
            f"`--device {options.device}` is for `--dry-run`, which asks nothing of this machine",
            "write `--device cuda` for the GPUs of this machine",
        )


def machines(options: Options, word: str) -> tuple[int, int]:
    """-> machines, and ranks of each."""
    least, most = node_range(options.nnodes)
    if least != most:
        raise PlanError(
            f"`--nnodes {options.nnodes}` leaves open how many machines there are",
            "give one number",
        )
    if options.world is None:
        if not options.nproc.isdecimal():
            raise PlanError(
                f"`--device {word}` is elsewhere, and the number of ranks is not said",
                "add `--world 8`",
            )
        return most, int(options.nproc)
    if most > 1 or options.nproc.isdecimal():
        nproc = int(options.nproc) if options.nproc.isdecimal() else options.world // most
        if nproc * most != options.world:
            raise PlanError(
                f"`--world {options.world}` is not {most} machines of {nproc} ranks",
                f"give `--world {max(1, nproc) * most}`, or leave `--nnodes` and `--nproc` out",
            )
        return most, nproc
    found = topology_for(options.world, None, options.world if word == "cpu" else 8)
    return found.nodes, found.gpus


def check_gpus_asked(options: Options, gpus: int, listed: str | None) -> None:
    """Raises LaunchError where a GPU is asked for, and none is visible. listed: the value of
    CUDA_VISIBLE_DEVICES."""
    by_recipe = options.device is None and options.hardware not in (None, "cpu")
    if gpus or not (options.device == "cuda" or options.nproc == "gpu" or by_recipe):
        return
    word = "--device cuda" if options.device == "cuda" else "--nproc gpu"
    asks = f"recipe `{options.recipe}`" if by_recipe else f"`{word}`"
    hint = "use `--device cpu`"
    if listed is not None:
        hint += f", or change `CUDA_VISIBLE_DEVICES`, which is `{listed}`"
    raise LaunchError(f"{asks} needs a GPU, and none is visible", hint)
