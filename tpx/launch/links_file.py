"""Where measured links are kept, which library versions are here, and whether a table fits both.

One file a device and topology, in XDG_CACHE_HOME or ~/.cache. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from ..errors import PlanError
from ..plan.device import Device
from ..plan.links import Key, Links, read_table, stale
from ..plan.topology import Topology

MEASURE = "`tpx bench links` on the ranks themselves measures them"
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


def links_path(device: str, topology: str, environ: Mapping[str, str] | None = None) -> Path:
    """device: as device.py names it, which may be a product's whole name."""
    environ = os.environ if environ is None else environ
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "~"), ".cache")
    word = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    return Path(cache).expanduser() / "tpx" / "links" / f"{word}-{topology}.json"


def library_versions(backend: str) -> dict[str, str]:
    """Of torch, and of NCCL where it moves the bytes; as the package index knows them."""
    names = {"torch": ("torch",), "nccl": NCCL if backend == "nccl" else ()}
    found = {library: version_of(packages) for library, packages in names.items()}
    return {library: version for library, version in found.items() if version}


def version_of(packages: tuple[str, ...]) -> str | None:
    for name in packages:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def find_links(
    device: Device,
    topology: Topology,
    file: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Links:
    """The measured table that fits, else none; `note` says which, and why another was refused.

    file: one that the user named. It must be of this device (PlanError); it may be of other
    library versions, since it may have been carried here.
    """
    wanted = Key(device.name, str(topology), library_versions(device.backend))
    if file is not None:
        table = read_table(Path(file))
        if table.key.device != device.name:
            raise PlanError(
                f"`--links {file}` is of `{table.key.device}`, and the plan is for `{device.name}`",
                f"use `--device {table.key.device}`, or another table",
            )
        other = stale(table.key, wanted)
        note = f"links: measured, `{file}`" + (f"; {other}" if other else "")
        return Links(device, topology, table, note)
    # A table of one node tells about groups inside nodes, however many there are.
    notes = []
    for shape in dict.fromkeys((str(topology), f"1x{topology.gpus}")):
        path = links_path(device.name, shape, environ)
        if not path.is_file():
            continue
        table = read_table(path)
        reason = stale(table.key, wanted)
        if reason is None:
            return Links(device, topology, table, f"links: measured, `{path}`")
        notes.append(f"`{path}` is not used, since {reason}; {MEASURE} again")
    said = "; ".join(notes) or f"not measured; {MEASURE}"
    return Links(device, topology, None, f"links: stated figures: {said}")
