"""Sharded checkpoints that are headers and holes, and what holds for each of their ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

from headers import make_config, write_folder

from tpx.plan.forms import slots
from tpx.plan.manifest import Stored, file_name
from tpx.plan.prepare import Prepared, prepare
from tpx.plan.rank_files import manifest_of, rank_files
from tpx.plan.spans import spans
from tpx.version import __version__

AGAIN = "shard the original checkpoint again: `tpx shard`"


def lay_out_sharded(prepared: Prepared, out: Path) -> Path:
    """As `tpx shard` leaves it, with holes for data and for the hashes of data."""
    out.mkdir(parents=True)
    stored = {}
    for file in rank_files(prepared):
        (out / file.name).write_bytes(file.head)
        os.truncate(out / file.name, file.nbytes)
        stored[file.name] = Stored(file.nbytes, "0" * 64, file.header_digest)
    (out / "config.json").write_text(json.dumps(prepared.config))
    (out / "tpx.json").write_text(manifest_of(prepared, stored, __version__).to_json())
    return out


def two_ranks(folder: Path) -> Path:
    """`folder/two`, sharded by tp2-ep2, and its original, `folder/whole`."""
    whole = write_folder(folder / "whole", make_config())
    return lay_out_sharded(prepare(whole, "tp2-ep2", 2), folder / "two")


def check_one_span(prepared: Prepared) -> None:
    for rank in range(prepared.world):
        plan, name = prepared.rank_plan(rank), file_name(rank, prepared.world)
        [span] = spans(plan, 0)
        file = prepared.folder / name
        assert (span.file, span.offset % 4096, span.end) == (name, 0, file.stat().st_size)
        assert sum(copy.kept for copy in span.copies) == span.nbytes
        held = [name for name in slots(plan, "bfloat16") if plan.shards[name].numel]
        assert [copy.parameter for copy in span.copies] == held
        assert {copy.rows for copy in span.copies} == {1}
