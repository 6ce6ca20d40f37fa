"""What ranks need of a checkpoint on the Hub, fetched before they load: blocks, or whole files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .. import hub
from ..errors import CheckpointError
from ..index import CheckpointIndex
from .prepare import Prepared
from .spans import spans
from .types import RankPlan

# A share of the checkpoint's bytes: where more of them are to come, whole files are fetched. The
# Hub's client may well bring those 1 / 0.6 times as fast, in chunks that it knows from other
# repositories too, and they serve every plan and other programs.
WORTHWHILE = 0.6


@contextmanager
def fetched(
    prepared: Prepared,
    ranks: Sequence[int],
    download: str = hub.AUTO,
    report: hub.Report | None = None,
) -> Iterator[Prepared]:
    """While the context lasts, all that these ranks read is on the disk: of the value it gives,
    whose folder may be another one. download: one of hub.DOWNLOADS. Raises CheckpointError.

    The same folder, at once, where it is not a partial one. One process of a machine fetches, the
    others wait for it.
    """
    if not hub.is_partial(prepared.folder):
        yield prepared
        return
    needed = blocks_of([prepared.rank_plan(rank) for rank in ranks])
    whole = whole_files(prepared.folder, needed, download)
    if whole is not None:
        yield moved(prepared, whole)
        return
    with hub.holding(prepared.folder, needed, report):
        yield moved(prepared, prepared.folder)


def whole_files(folder: Path, needed: hub.Needed, download: str) -> Path | None:
    """The folder of whole files, where those are there, asked for or cheaper."""
    lacking = hub.missing(folder, needed, sealed=False)
    if download == "partial" or not (lacking or download == "full"):
        return None
    repository = hub.read_repository(folder)
    found = hub.cached_whole(repository.hub_id, repository.commit)
    if found is not None:
        return found
    to_fetch = sum(map(len, lacking.values())) * hub.BLOCK
    if download != "full" and to_fetch < WORTHWHILE * repository.nbytes:
        return None
    return hub.find_whole(repository.hub_id, repository.commit)


def blocks_of(rank_plans: Sequence[RankPlan]) -> hub.Needed:
    """Numbers of the blocks that hold what the ranks read."""
    found: dict[str, set[int]] = {}
    for rank_plan in rank_plans:
        for span in spans(rank_plan):
            blocks = range(span.offset // hub.BLOCK, (span.end - 1) // hub.BLOCK + 1)
            found.setdefault(span.file, set()).update(blocks)
    return {file: frozenset(blocks) for file, blocks in sorted(found.items())}


def check_fetched(folder: Path, rank_plan: RankPlan) -> None:
    """Raises CheckpointError where a rank would read a hole."""
    if not hub.is_partial(folder):
        return
    for shard, blocks in hub.missing(folder, blocks_of([rank_plan])).items():
        raise CheckpointError(
            f"`{shard}` of `{folder}` holds no byte from {min(blocks) * hub.BLOCK} on that rank "
            f"{rank_plan.rank} reads",
            "name the model by its Hub id, which fetches them",
        )


def moved(prepared: Prepared, folder: Path) -> Prepared:
    """The files as they are now: fetching has changed them, or they are elsewhere."""
    index = CheckpointIndex.open(folder)
    if index.header_digest != prepared.index.header_digest:
        raise CheckpointError(
            f"`{folder}` has other headers than `{prepared.folder}`", f"remove `{folder}`"
        )
    return replace(prepared, folder=folder, index=index)
