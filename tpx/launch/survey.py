"""What is known of a job before it starts: its checks, where each rank stands, which groups cross
machines. Printed by `--dry-run`, and kept in the run's folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..plan.device import Device
from .checks import Check, Machine, check_machine, gigabytes, is_loopback
from .gpus import GpuState, gpu_states
from .hardware import Hardware, product_here
from .links_file import find_links, library_versions
from .model import Model
from .needs import Need, needs_of
from .options import Options
from .placement import GroupPlace, RankPlace, group_places, rank_places
from .rendezvous import Rendezvous

FILE = "preflight.json"


class Survey(NamedTuple):
    """product: of the devices, by the name of plan/device.py. seconds: that the checks took."""

    product: str
    checks: tuple[Check, ...]
    ranks: tuple[RankPlace, ...]
    groups: tuple[GroupPlace, ...]
    links: str
    seconds: float


def survey(
    options: Options,
    environ: Mapping[str, str],
    hardware: Hardware,
    meeting: Rendezvous,
    model: Model,
    here: range,
) -> Survey:
    """here: the ranks of this machine, none where they are not numbered yet."""
    began = time.monotonic()
    product = hardware.elsewhere or product_here(hardware.device)
    links = find_links(product, hardware.topology, environ=environ)
    needs = all_needs(model, hardware, product)
    is_here, has_gpus = hardware.elsewhere is None, hardware.device == "cuda"
    gpus = gpu_states(environ) if is_here and has_gpus and options.preflight != "off" else None
    memory = int(product.memory.value) if has_gpus and product.memory else None
    mesh = model.prepared.plan.mesh if model.prepared else None
    checks = plan_checks(model)
    if hardware.elsewhere is not None:
        checks += paper_checks(needs, product, memory)
    elif options.preflight != "off":
        mine = [needs[rank] for rank in here if rank in needs]
        checks += here_checks(options, environ, hardware, meeting, product, mine, gpus)
    places = rank_places(
        hardware.world, hardware.nproc, mesh, needs, gpus, memory, hardware.device == "cuda"
    )
    return Survey(
        product=product.name,
        checks=tuple(checks),
        ranks=tuple(places),
        groups=tuple(group_places(mesh, links)) if mesh else (),
        links=links.note,
        seconds=time.monotonic() - began,
    )


def all_needs(model: Model, hardware: Hardware, product: Device) -> dict[int, Need]:
    if model.prepared is None:
        return {}
    return {each.rank: each for each in needs_of(model.prepared, range(hardware.world), product)}


def plan_checks(model: Model) -> list[Check]:
    """What prepare() has proved already; it raises where something is wrong."""
    prepared = model.prepared
    if prepared is None:
        return []
    facts = sum(proof.facts for proof in prepared.proofs)
    tensors = prepared.index.tensors.values()
    nbytes, files = sum(meta.nbytes for meta in tensors), len({meta.file for meta in tensors})
    return [
        Check("plan", "ok", f"{len(prepared.proofs)} proofs, {facts:,} facts"),
        Check("checkpoint", "ok", f"{len(tensors):,} tensors, {gigabytes(nbytes)} in {files} "
              f"file{'s' * (files > 1)}, each as long as its header says"),
    ]  # fmt: skip


def paper_checks(needs: Mapping[int, Need], product: Device, memory: int | None) -> list[Check]:
    """A device that has nothing else to do."""
    if memory is None or not needs:
        return []
    most = max(needs.values(), key=lambda need: need.total)
    said = f"rank {most.rank} needs {gigabytes(most.total)} of {gigabytes(memory)}"
    if most.total <= memory:
        return [Check("memory", "ok", said)]
    hint = "cut over more ranks, or use a smaller model"
    return [Check("memory", "fault", f"{said} that an {product.name} has", hint)]


def here_checks(
    options: Options,
    environ: Mapping[str, str],
    hardware: Hardware,
    meeting: Rendezvous,
    product: Device,
    needs: Sequence[Need],
    gpus: Sequence[GpuState] | None,
) -> list[Check]:
    host = meeting.endpoint.rpartition(":")[0].strip("[]")
    apart = hardware.nodes[1] > 1 and not is_loopback(host)
    where = f"`{meeting.endpoint}`" if hardware.nodes[1] > 1 else "a free one of this machine"
    found = [Check("port", "ok", where)]
    recipe = options.hardware
    if recipe and hardware.device == "cuda" and gpus and recipe not in gpus[0].name.lower():
        said = f"recipe `{options.recipe}` is for {recipe}, and GPU 0 is `{gpus[0].name}`"
        found.append(Check("hardware", "doubt", said))
    machine = Machine(hardware.device, product, hardware.nproc, hardware.world, apart, needs, gpus)
    return found + check_machine(machine, environ)


def write_survey(found: Survey, run_dir: Path) -> None:
    """<run dir>/preflight.json."""
    data = {
        "product": found.product,
        "seconds": round(found.seconds, 3),
        "versions": library_versions("nccl"),
        "checks": [check._asdict() for check in found.checks],
        "ranks": [
            {**place._asdict(),
             "coords": place.coords._asdict() if place.coords else None,
             "need": place.need._asdict() if place.need else None}
            for place in found.ranks
        ],
        "groups": [{**group._asdict(), "span": group.span._asdict()} for group in found.groups],
        "links": found.links,
    }  # fmt: skip
    (run_dir / FILE).write_text(json.dumps(data, indent=1))
