"""The files of a sharded checkpoint before they are written: what each holds, byte for byte.

A RankPlan's parts run backwards: each byte of a rank's file, and the byte of the checkpoint that it
is. Reads nothing.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .forms import joined
from .manifest import MANIFEST, Manifest, Stored, config_digest, file_name, sizes
from .prepare import Prepared
from .spans import Copy, Span, copies_of, item_bytes
from .types import Shard
from .write import to_yaml

# What lies beside the weights and is of use; all else that a folder may hold stays behind.
BESIDE = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "chat_template*",
)  # fmt: skip
OURS = (*BESIDE, MANIFEST, "rank-*-of-*.safetensors")
PAGE = 4096  # the data begins at a multiple of it, for reads that go past the page cache


@dataclass(frozen=True, slots=True)
class RankFile:
    """head: the bytes before the data. shards: in the order in which their data follows."""

    name: str
    head: bytes
    shards: dict[str, Shard]

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(map(shard_bytes, self.shards.values()))

    @property
    def header_digest(self) -> str:
        return hashlib.sha256(self.head[8:]).hexdigest()


def rank_files(prepared: Prepared) -> list[RankFile]:
    """Of ranks 0, 1, ...: the file that each shall read whole."""
    order = file_order(prepared)
    found = []
    for rank in range(prepared.world):
        held = prepared.rank_plan(rank).shards
        shards = {name: held[name] for name in order}
        found.append(RankFile(file_name(rank, prepared.world), head_of(shards), shards))
    return found


def file_order(prepared: Prepared) -> list[str]:
    """Parameters as the checkpoint's files have them, those that an arena joins together, but those
    of wider elements first, so that all lie at a multiple of their element's size. Tied ones are
    left out."""

    def key(name: str) -> tuple[int, str, int]:
        metas = [prepared.index.tensors[s.tensor] for s in parameters[name].sources]
        first = min(metas, key=lambda meta: (meta.file, meta.offset))
        return -item_bytes(first.dtype), first.file, first.offset

    parameters = {n: p for n, p in prepared.layout.parameters.items() if p.tied_to is None}
    return [name for run in joined(sorted(parameters, key=key)) for name in run]


def head_of(shards: dict[str, Shard]) -> bytes:
    """Eight bytes of length, then the header as JSON and blanks up to a whole page."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shard in shards.items():
        begin, end = end, end + shard_bytes(shard)
        header[name] = {
            "dtype": shard.dtype,
            "shape": shard.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def shard_bytes(shard: Shard) -> int:
    return shard.numel * item_bytes(shard.dtype)


def backwards(shard: Shard) -> Span:
    """The shard's bytes from 0, and where in the checkpoint each comes from: `parameter` is a file
    of it, `target` a byte of that file."""
    copies = [
        Copy(file, to, at, nbytes, rows, jump, step)
        for part in shard.parts
        for file, at, to, nbytes, rows, step, jump in copies_of(part.meta.file, part, shard)
    ]
    copies.sort(key=lambda copy: copy.source)
    return Span("", 0, shard_bytes(shard), tuple(copies))


def reads(copy: Copy, gap: int, most: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the copy to read at once: neighbours, where at most `gap` bytes lie
    between them, up to `most` bytes; else one by one."""
    step = copy.target_step
    near = copy.rows > 1 and step - copy.nbytes <= gap
    count = max(1, (most - copy.nbytes) // step + 1) if near else 1
    for first in range(0, copy.rows, count):
        yield first, min(count, copy.rows - first)


def manifest_of(prepared: Prepared, files: dict[str, Stored], version: str) -> Manifest:
    return Manifest(
        tpx=version,
        world=prepared.world,
        mesh=sizes(prepared.plan.mesh),
        plan=to_yaml(prepared.plan),
        config=config_digest(prepared.config),
        source=prepared.index.header_digest,
        files=files,
        tensors=prepared.index.tensors,
    )
