"""A checkpoint for the server of hub_server.py, and what tests ask of its download."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from headers import make_config, write_folder
from hub_server import Request, files_of

from tpx import hub
from tpx.errors import CheckpointError
from tpx.plan.fetch import blocks_of, fetched
from tpx.plan.prepare import Prepared

COMMIT, LATER = "a" * 40, "b" * 40
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "vocab_size": 1031}


def random_files(folder: Path) -> dict[str, bytes]:
    """Two shards of 14 MB of random bytes, that plans cut in the middle of blocks."""
    write_folder(folder, make_config(**SIZES), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    found = files_of(folder)
    for name, data in found.items():
        if name.endswith(".safetensors"):
            start = 8 + int.from_bytes(data[:8], "little")
            found[name] = data[:start] + random.Random(name).randbytes(len(data) - start)
    return found


def more(*values: object) -> list[object]:
    """Cases that `make test` has no time for."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.more)
        for value in values
    ]


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def fetch(prepared: Prepared, ranks: Sequence[int], download: str = "auto") -> Prepared:
    with fetched(prepared, ranks, download) as found:
        return found


def bytes_asked(requests: Sequence[Request]) -> int:
    return sum(request.stop - request.start for request in requests if request.kind == "cdn")


def check_bytes(prepared: Prepared, ranks: Sequence[int], files: dict[str, bytes]) -> None:
    """What the ranks read is what the Hub has; what they do not read is a hole."""
    needed = blocks_of([prepared.rank_plan(rank) for rank in ranks])
    for name, blocks in needed.items():
        data, size = (prepared.folder / name).read_bytes(), len(files[name])
        assert len(data) == size
        header = 8 + int.from_bytes(data[:8], "little")
        for number, start in enumerate(range(0, size, hub.BLOCK)):
            kept = start + hub.BLOCK if number in blocks else max(start, min(size, header))
            kept = min(kept, size)
            assert data[start:kept] == files[name][start:kept]
            hole = data[kept : start + hub.BLOCK]
            assert hole.count(0) == len(hole)


def refusal(call: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(CheckpointError) as error:
        call()
    return error.value.message, error.value.hint


def nbytes(needed: hub.Needed, files: dict[str, bytes]) -> int:
    return sum(
        min((number + 1) * hub.BLOCK, len(files[name])) - number * hub.BLOCK
        for name, blocks in needed.items()
        for number in blocks
    )
