"""One rank's place, device and default process group: under torchrun, `tpx launch`, or alone.

Reads the environment that torchrun sets. Knows no plan and no model; a mesh's groups are comm.py's.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
from torch import distributed

from .comm import Group, Groups
from .errors import LaunchError, RequestError, TpxError
from .kernels import Device
from .launch.progress import Writer, draw_once, expect, launcher_draws
from .mesh import Mesh

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of a collective that other ranks do not enter


class Place(NamedTuple):
    """This process among all ranks, and among those of this machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


ALONE = Place(0, 1, 0, 1)


def place(environ: Mapping[str, str] | None = None) -> Place:
    """From torchrun's variables, or from the default process group where a script made one.

    Raises LaunchError where variables are missing or make no sense.
    """
    environ = os.environ if environ is None else environ
    if distributed.is_available() and distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
        local_rank = read_number(environ, "LOCAL_RANK", rank)
        return Place(rank, world, local_rank, read_number(environ, "LOCAL_WORLD_SIZE", world))
    if "RANK" not in environ:
        return ALONE
    if "WORLD_SIZE" not in environ:
        raise LaunchError(
            f"`RANK` is `{environ['RANK']}`, and `WORLD_SIZE` is not set",
            "start the script with `tpx launch` or `torchrun`, or `unset RANK`",
        )
    rank, world = read_number(environ, "RANK", 0), read_number(environ, "WORLD_SIZE", 1)
    if rank >= world:
        raise LaunchError(
            f"`RANK` is `{rank}`, and `WORLD_SIZE` is `{world}`",
            f"ranks are numbered from 0 to {world - 1}" if world else "there is no rank at all",
        )
    local_rank = read_number(environ, "LOCAL_RANK", rank)
    return Place(rank, world, local_rank, read_number(environ, "LOCAL_WORLD_SIZE", world))


def ranks_here(place: Place) -> range:
    """The ranks of this machine; this one alone where they are not consecutive."""
    rank, world, local_rank, local_world = place
    first = rank - local_rank
    consecutive = first >= 0 and first % local_world == 0 and first + local_world <= world
    return range(first, first + local_world) if consecutive else range(rank, rank + 1)


def read_number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise LaunchError(
            f"`{name}` is `{text}`, and must be a whole number",
            "start the script with `tpx launch` or `torchrun`, which set it",
        )
    return int(text)


def setting(argument: T | None, variable: str, default: T | None = None) -> T | str | None:
    """The argument, else the environment variable, else the default."""
    if argument is not None:
        return argument
    return os.environ.get(variable) or default


def run_dir() -> Path | None:
    """Where `tpx launch` keeps the records of this run; None: it did not start this process."""
    text = os.environ.get("TPX_RUN_DIR")
    return Path(text) if text else None


def choose_device(device: str | None, place: Place) -> torch.device:
    """None: a GPU for each local rank where there is any, else the CPU.

    device: "cpu", "cuda" (this rank's own GPU) or "cuda:N". Raises LaunchError where there are too
    few GPUs, RequestError on another word.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    word = device or ("cuda" if gpus else "cpu")
    if word == "cpu":
        return torch.device("cpu")
    kind, _, number = word.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise RequestError(f"`device={word!r}` is unknown", 'use `device="cuda"` or `device="cpu"`')
    if not gpus:
        raise LaunchError(
            f"`device={word!r}` needs a GPU, and none is visible",
            'use `device="cpu"`, or `tpx launch --device cpu`',
        )
    if place.local_world > gpus:
        raise LaunchError(
            f"{place.local_world} ranks of this machine need {place.local_world} GPUs, and {gpus} "
            f"{'is' if gpus == 1 else 'are'} visible",
            'use `device="cpu"`, or `tpx launch --device cpu`',
        )
    index = int(number) if number and place.local_world == 1 else place.local_rank
    if index >= gpus:
        raise LaunchError(
            f"`device={word!r}` does not exist: {gpus} GPUs are visible",
            f"use `cuda:0` to `cuda:{gpus - 1}`",
        )
    return torch.device("cuda", index)


def describe_device(device: torch.device) -> Device:
    """What decides whether kernels run there; only NVIDIA's have a capability."""
    if device.type == "cpu":
        return Device("cpu")
    is_nvidia = torch.version.cuda is not None
    capability = torch.cuda.get_device_capability(device) if is_nvidia else None
    return Device(device.type, torch.cuda.get_device_name(device), capability)


def start(place: Place, device: torch.device) -> None:
    """Makes the default process group, unless there is one or no other rank. Raises LaunchError."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.world == 1 or distributed.is_initialized():
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise LaunchError(
            f"`WORLD_SIZE` is `{place.world}`, and `{missing[0]}` is not set",
            "start the script with `tpx launch` or `torchrun`, which set it",
        )
    on_gpu = device.type == "cuda"
    try:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=place.rank,
            world_size=place.world,
            timeout=TIMEOUT,
            device_id=device if on_gpu else None,
        )
    except distributed.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"rank {place.rank} could not meet the others at `{where}`: "
            f"{str(error).partition(chr(10))[0]}",
            "check that every rank has been started, with the same address",
            exit_code=7,
        ) from error
    atexit.register(stop)


def stop() -> None:
    """Ends the default process group; after an error the other ranks may be gone, so not then."""
    failed = getattr(sys, "last_value", None) is not None
    if distributed.is_initialized() and not failed:
        distributed.destroy_process_group()


class Worker:
    """What one rank knows of itself; made once, by the LLM. device: see choose_device."""

    def __init__(self, device: str | None = None):
        if "RANK" in os.environ:
            install_excepthook()
        self.place = place()
        self.device = choose_device(device, self.place)

    def groups(self, mesh: Mesh) -> Groups:
        """The mesh's groups; starts the default process group. All ranks call it together."""
        assert mesh.world == self.place.world, f"{mesh.world=} {self.place.world=}"
        start(self.place, self.device)
        return Groups(mesh, self.place.rank, self.device, self._ranks_a_machine())

    def _ranks_a_machine(self) -> int:
        """As all ranks agree: machines of different sizes, or whose ranks are not consecutive ones,
        are machines of one rank."""
        rank, world, local_rank, local_world = self.place
        everyone = Group("world", tuple(range(world)), rank, self.device)
        mine = local_world if rank % local_world == local_rank else 1
        sizes = everyone.all_gather(torch.tensor([mine], device=self.device), "machines").tolist()
        return mine if len(set(sizes)) == 1 else 1

    def progress(self) -> Writer:
        """Where to say how far this rank is. It is drawn by the launcher, else by rank 0; a process
        by itself draws on a terminal only."""
        if self.place == ALONE and run_dir() is None and not sys.stderr.isatty():
            return Writer(Path(os.devnull))
        folder = progress_folder()
        writer = Writer(folder / str(self.place.local_rank))
        if self.place.local_rank == 0 and not launcher_draws(folder):
            expect(folder)
            arguments = (folder, self.place.local_world)
            threading.Thread(target=draw_once, args=arguments, daemon=True).start()
        return writer


def progress_folder() -> Path:
    """One that all ranks of this machine share."""
    found = run_dir()
    return found / "progress" if found is not None else job_folder()


def job_folder() -> Path:
    """Of the ranks that one torchrun started, in one attempt; of this process where it is alone."""
    job = os.getppid() if "RANK" in os.environ else os.getpid()
    # Start time in ticks, field 22 of proc(5): a pid that is used again is not the same job.
    started = Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[19]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Path(tempfile.gettempdir(), f"tpx-{os.getuid()}-{job}-{started}-{attempt}")


def install_excepthook() -> None:
    """An uncaught TpxError is printed by one local rank, and every rank exits with its code.

    Under `tpx launch` errors do not come this far: its shim records them for the launcher.
    """
    if not isinstance(sys.excepthook, partial):
        sys.excepthook = partial(end_with_error, sys.excepthook)


def end_with_error(
    previous: object, kind: type[BaseException], error: BaseException, frames: TracebackType | None
) -> None:
    if not isinstance(error, TpxError):
        assert callable(previous)
        previous(kind, error, frames)
        return
    print_once(error.render())
    raise SystemExit(error.exit_code)


def print_once(text: str) -> None:
    """The first rank of this machine prints; the others wait for it, since the launcher ends all
    ranks when one of them ends."""
    path = job_folder() / sha256(text.encode()).hexdigest()[:16]
    path.parent.mkdir(exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        deadline = time.monotonic() + 1
        while not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.005)
        return
    print(text, file=sys.stderr, flush=True)
    path.write_text("printed")
