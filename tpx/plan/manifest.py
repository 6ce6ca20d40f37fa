"""tpx.json: by which plan a checkpoint was sharded, and from what. Knows its form alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..files import open_file, read
from ..index import DTYPE_BITS, TensorMeta
from ..mesh import AXES, Mesh
from ..strict_json import MOST_BYTES, parse_json, shown
from .types import MOST_RANKS

MANIFEST = "tpx.json"
FORMAT = 1
TEXTS = ("tpx", "plan", "config", "source")
KEYS = {"format", "world", "mesh", "files", "tensors", *TEXTS}
AGAIN = "shard the original checkpoint again: `tpx shard`"
SHA256 = re.compile(r"[0-9a-f]{64}")


class Stored(NamedTuple):
    """A file as it was written. sha256: of all its bytes; header: of those of its header alone."""

    nbytes: int
    sha256: str
    header: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """tpx: the version that wrote it. plan: YAML. config: sha256 of config.json's values. source:
    the digest of the original's headers. files: of rank 0, 1, ..., by name. tensors: the
    original's; their place is not kept."""

    tpx: str
    world: int
    mesh: dict[str, int]
    plan: str
    config: str
    source: str
    files: dict[str, Stored]
    tensors: dict[str, TensorMeta]

    def to_json(self) -> str:
        said = {
            "format": FORMAT,
            "tpx": self.tpx,
            "world": self.world,
            "mesh": self.mesh,
            "plan": self.plan,
            "config": self.config,
            "source": self.source,
            "files": {name: file._asdict() for name, file in self.files.items()},
            "tensors": {name: [meta.dtype, meta.shape] for name, meta in self.tensors.items()},
        }
        return json.dumps(said, indent=1) + "\n"


def file_name(rank: int, world: int) -> str:
    return f"rank-{rank:05}-of-{world:05}.safetensors"


def sizes(mesh: Mesh) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in AXES}


def config_digest(config: Mapping[str, Any]) -> str:
    """Of the values, however they are written."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def is_sharded(folder: Path) -> bool:
    return os.path.lexists(folder / MANIFEST)


def world_of(folder: Path) -> int | None:
    """How many ranks the folder is sharded for; None: it is not sharded."""
    return read_manifest(folder)[0].world if is_sharded(folder) else None


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """-> (what tpx.json says, sha256 of its bytes). Raises CheckpointError."""
    with open_file(folder / MANIFEST, MANIFEST) as file:
        data = read(file, MOST_BYTES + 1, MANIFEST)
    if len(data) > MOST_BYTES:
        raise damaged(f"it has more than {MOST_BYTES} bytes")
    return _manifest(parse_json(data, MANIFEST)), hashlib.sha256(data).hexdigest()


def damaged(what: str) -> CheckpointError:
    return CheckpointError(f"`{MANIFEST}` is damaged: {what}", AGAIN)


def _manifest(said: Any) -> Manifest:
    if not isinstance(said, dict) or "format" not in said:
        raise damaged("it has no `format`")
    if type(said["format"]) is not int or said["format"] != FORMAT:
        raise CheckpointError(
            f"`{MANIFEST}` has format `{shown(said['format'])}`, and this tpx reads {FORMAT}",
            f"use the tpx that wrote it, or {AGAIN}",
        )
    if said.keys() != KEYS:
        raise damaged(f"its keys are `{shown(sorted(said))}`")
    for key in TEXTS:
        if not isinstance(said[key], str):
            raise damaged(f"`{key}` is no text")
    world = said["world"]
    if type(world) is not int or not 1 <= world <= MOST_RANKS:
        raise damaged(f"`world` is `{shown(world)}`")
    if not isinstance(said["tensors"], dict):
        raise damaged("`tensors` is no object")
    return Manifest(
        **{key: said[key] for key in ("world", "mesh", *TEXTS)},
        files=_files(said["files"], [file_name(rank, world) for rank in range(world)]),
        tensors={name: _tensor(name, entry) for name, entry in said["tensors"].items()},
    )


def _files(said: Any, names: Sequence[str]) -> dict[str, Stored]:
    if not isinstance(said, dict) or said.keys() != set(names):
        raise damaged(f"`files` are not `{names[0]}` to `{names[-1]}`")
    return {name: _stored(name, said[name]) for name in names}


def _stored(name: str, said: Any) -> Stored:
    if not isinstance(said, dict) or said.keys() != set(Stored._fields):
        raise damaged(f"`{name}` needs {', '.join(Stored._fields)}, and no more")
    found = Stored(**said)
    texts = [found.sha256, found.header]
    if type(found.nbytes) is not int or not all(
        isinstance(text, str) and SHA256.fullmatch(text) for text in texts
    ):
        raise damaged(f"`{name}` has no size and hashes")
    return found


def _tensor(name: str, said: Any) -> TensorMeta:
    """Messages name tpx.json as its file."""
    dtype, shape = said if isinstance(said, list) and len(said) == 2 else (None, None)
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPE_BITS
        or not isinstance(shape, list)
        or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
    ):
        raise damaged(f"tensor `{shown(name)}` has no dtype and shape")
    nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
    return TensorMeta(name, MANIFEST, dtype, tuple(shape), 0, nbytes)
