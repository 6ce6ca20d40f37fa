"""For each operation the kernel that runs, and why: from what was asked for and what is here.

Imports no kernel and asks no network. Where triton cannot run the torch references do, whatever
was asked for; a kernel that was asked for by name and is missing is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import RequestError
from .hub import check_library, find_cached
from .installed import why_not
from .local import find_local, local_version
from .operations import OPERATIONS, Package
from .wanted import BEST, Wanted

LOG = logging.getLogger("tpx")
LEAST_CAPABILITY = (7, 5)  # below, triton has no matrix product of 16-bit floats
LOST = "the reference operations run, which are slow on a GPU"


class Device(NamedTuple):
    """kind: "cpu" or "cuda". capability: CUDA's, of an NVIDIA GPU; None elsewhere."""

    kind: str
    name: str = ""
    capability: tuple[int, int] | None = None


class Choice(NamedTuple):
    """source: "local", "hub" or "off" (the torch reference). repo: a package's name, or a
    repository of the Hub. path: the folder it is imported from; "" where it is still to be
    fetched."""

    operation: str
    source: str
    repo: str
    version: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kernels:
    """A choice for each of OPERATIONS, in that order."""

    wanted: Wanted
    device: Device
    choices: tuple[Choice, ...]

    def lost(self) -> list[str]:
        """Operations that the reference runs, though nobody asked for that."""
        off = [choice.operation for choice in self.choices if choice.source == "off"]
        return [operation for operation in off if self.wanted.sources[operation] != "off"]

    def missing(self) -> list[str]:
        """Those of `lost` whose kernel was asked for by name."""
        return [operation for operation in self.lost() if self.wanted.sources[operation] != BEST]

    def log(self) -> None:
        """A GPU without kernels is worth a warning."""
        lost = self.device.kind != "cpu" and bool(self.lost())
        for line in describe(self.choices):
            LOG.log(logging.WARNING if lost else logging.INFO, line)


def choose(wanted: Wanted, device: Device) -> Kernels:
    """Raises RequestError."""
    unfit = why_unfit(device)
    return Kernels(wanted, device, tuple(_choose(name, wanted, unfit) for name in OPERATIONS))


def why_unfit(device: Device) -> str | None:
    """Why no kernel runs on a device, and what to do about it; None: they do."""
    if device.kind == "cpu":
        return "they need a GPU"
    if device.capability is None:
        return f"{device.name or device.kind} is no NVIDIA GPU"
    if device.capability < LEAST_CAPABILITY:
        has, needs = (".".join(map(str, x)) for x in (device.capability, LEAST_CAPABILITY))
        return f"{device.name} has capability {has}, and they need {needs}"
    fault = why_not("triton")
    return None if fault is None else f"{fault} (`pip install 'tpx[gpu]'`)"


def describe(choices: Sequence[Choice]) -> list[str]:
    """A line for each way that operations run, the operations that share it together."""
    ways: dict[Choice, list[str]] = {}
    for choice in choices:
        ways.setdefault(choice._replace(operation=""), []).append(choice.operation)
    return [_line(way, names, len(ways) == 1) for way, names in ways.items()]


def _line(way: Choice, operations: list[str], alone: bool) -> str:
    of = "" if alone else f" for {', '.join(operations)}"
    if way.source == "off":
        return f"kernels{of}: off, {way.reason}; {LOST}"
    where = f" in {way.path}" if way.path else ""
    return f"kernels{of}: {way.source}, {way.repo} {way.version}{where}, {way.reason}"


def _choose(operation: str, wanted: Wanted, unfit: str | None) -> Choice:
    package, source = OPERATIONS[operation].package, wanted.sources[operation]
    if source == "off":
        return Choice(operation, "off", "", "", "", "as asked")
    if unfit is not None:
        return Choice(operation, "off", "", "", "", unfit)
    if source == BEST:
        return _best(operation, package)
    if source == "local":
        return _local(operation, package)
    repo, _, version = source.partition("@")
    if source == "hub":
        repo, version = package.repo, package.version
    check_library(operation, repo)
    return Choice(operation, "hub", repo, version, "", "as asked")


def _best(operation: str, package: Package) -> Choice:
    folder = find_local(package)
    if folder is not None:
        version = local_version(folder)
        return Choice(operation, "local", package.name, version, str(folder), "the default")
    cached = find_cached(package.repo, package.version)
    if cached is not None:
        where = package.repo, package.version, str(cached)
        return Choice(operation, "hub", *where, f"{package.name} is not here")
    return Choice(operation, "off", "", "", "", f"{package.name} is not here, nor in the cache")


def _local(operation: str, package: Package) -> Choice:
    folder = find_local(package)
    if folder is None:
        raise RequestError(
            f"`{operation}` asks for the local kernels, and `{package.name}` is not here",
            "install tpx as a whole, or leave `use_kernels` out",
        )
    return Choice(operation, "local", package.name, local_version(folder), str(folder), "as asked")
