"""A checkpoint that is cut already, into one file a rank: which plans and worlds it fits.

What was proved of the original is proved again, from the table of its tensors in tpx.json. A rank's
shards are then whole tensors of its own file, in the file's order. Reads no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PlanError
from ..families.layout import Layout
from ..index import CheckpointIndex, FileId, Header, TensorMeta, read_header
from .load import parse_plan
from .manifest import (
    AGAIN,
    MANIFEST,
    Stored,
    config_digest,
    damaged,
    file_name,
    is_sharded,
    read_manifest,
    sizes,
)
from .match import match_rules
from .patterns import generalised
from .types import Part, Plan, RankPlan, Shard
from .write import to_yaml

ITS_OWN = (
    "leave the plan out, since a sharded checkpoint brings its own, or shard the original by this "
    "one: `tpx shard --tp-plan PLAN`"
)


@dataclass(frozen=True, slots=True)
class Presharded:
    """plan: by which the files were cut. index: the tensors of the original, and the ranks' files.
    tensors: in each rank's file, by parameter."""

    plan: Plan
    index: CheckpointIndex
    tensors: tuple[dict[str, TensorMeta], ...]

    @property
    def text(self) -> str:
        return to_yaml(self.plan, f"As the checkpoint is sharded: {self.plan.mesh}.")

    def check_world(self, world: int) -> None:
        """Raises PlanError where there are not as many ranks as files."""
        needs = len(self.tensors)
        if world == needs:
            return
        ranks, there = f"{needs} rank{'s' * (needs > 1)}", f"are {world}" if world > 1 else "is 1"
        raise PlanError(
            f"`{self.index.folder}` is sharded for {ranks} ({self.plan.mesh}), and there {there}",
            f"start {ranks} (`tpx launch --nproc {needs}`), or shard the original for {world}: "
            f"`tpx shard --world {world}`",
        )

    def check_plan(self, plan: Plan, layout: Layout) -> None:
        """Raises PlanError where `plan` cuts anything unlike the one that the files were cut by."""
        folder, mine = self.index.folder, self.plan
        if plan.mesh != mine.mesh:
            raise PlanError(
                f"plan `{plan.path}` is for {plan.mesh}, and `{folder}` is sharded for {mine.mesh}",
                ITS_OWN,
            )
        asked, done = match_rules(plan, layout), match_rules(mine, layout)
        for name in layout.parameters:
            if asked[name].style != done[name].style:
                raise PlanError(
                    f"plan `{plan.path}` says `{asked[name].style}` for `{generalised(name)}`, and "
                    f"`{folder}` is sharded with `{done[name].style}`",
                    ITS_OWN,
                )

    def refuse(self) -> PlanError:
        """For what needs more of the checkpoint than one rank holds."""
        return PlanError(
            f"`{self.index.folder}` is sharded ({self.plan.mesh}), and this needs the checkpoint "
            "that it was made of",
            "give that one",
        )

    def own(self, plan: RankPlan) -> RankPlan:
        """The same shards, each read whole from the rank's own file. Raises CheckpointError."""
        file, stored = file_name(plan.rank, len(self.tensors)), self.tensors[plan.rank]
        shards = {
            name: shard
            if shard.tied_to is not None or not shard.numel
            else replace(shard, parts=(_whole(name, shard, stored, file),))
            for name, shard in plan.shards.items()
        }
        return replace(plan, shards=shards)


def _whole(name: str, shard: Shard, stored: Mapping[str, TensorMeta], file: str) -> Part:
    meta = stored.get(name)
    if meta is None or (meta.dtype, meta.shape) != (shard.dtype, shard.shape):
        found = f"holds {meta.dtype} {list(meta.shape)}" if meta else "does not hold it"
        raise CheckpointError(
            f"the plan gives `{name}` as {shard.dtype} {list(shard.shape)}, and `{file}` {found}",
            AGAIN,
        )
    return Part(meta, tuple(((0, size),) for size in meta.shape), (0,) * len(meta.shape))


def open_index(folder: Path, config: Mapping[str, Any]) -> CheckpointIndex:
    """What the checkpoint holds, or where it is sharded, what the original held."""
    sharded = open_presharded(folder, config)
    return CheckpointIndex.open(folder) if sharded is None else sharded.index


def open_presharded(folder: Path, config: Mapping[str, Any]) -> Presharded | None:
    """None where the folder is not sharded. Reads the headers of all ranks' files.

    Raises CheckpointError for a manifest that is damaged, and for files or a config.json that it
    was not written with.
    """
    if not is_sharded(folder):
        return None
    manifest, digest = read_manifest(folder)
    plan = parse_plan(manifest.plan, MANIFEST)
    if (sizes(plan.mesh), plan.mesh.world) != (manifest.mesh, manifest.world):
        raise damaged(f"its plan is for {plan.mesh}, its mesh or world another")
    if config_digest(config) != manifest.config:
        raise CheckpointError(
            f"`config.json` is not the one that `{folder}` was sharded with",
            f"put that one back, or {AGAIN}",
        )
    found = {name: _header(folder, name, stored) for name, stored in manifest.files.items()}
    files = {name: file for name, (_, file) in found.items()}
    tensors = tuple({meta.name: meta for meta in head.tensors} for head, _ in found.values())
    return Presharded(plan, CheckpointIndex(folder, manifest.tensors, files, digest), tensors)


def _header(folder: Path, name: str, stored: Stored) -> tuple[Header, FileId]:
    header, file = read_header(folder / name, name)
    if (header.file_size, header.digest) != (stored.nbytes, stored.header):
        raise CheckpointError(
            f"`{name}` is not the file that `{MANIFEST}` was written with",
            f"copy the whole folder again, or {AGAIN}",
        )
    return header, file
