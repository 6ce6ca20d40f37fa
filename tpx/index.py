"""CheckpointIndex: what tensors a folder of safetensors files holds, from their headers alone.

Reads no data. A file that is damaged, cut short or not what the index file says is refused here,
so that no rank can meet it later: stricter than the safetensors package (tests/test_index.py has a
case for each check). Knows no model family and no plan.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .errors import CheckpointError
from .files import open_file, read, unreadable
from .strict_json import AGAIN, MOST_BYTES, damaged, parse_json, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = MOST_BYTES  # as in the format's own implementation
MOST_TENSORS = 1_000_000
MOST_DIMENSIONS = 32
MOST_NAME = 1000  # characters
HALVES = re.compile("[\ud800-\udfff]")  # of characters: JSON can say them, UTF-8 cannot
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


class TensorMeta(NamedTuple):
    """Where one tensor's bytes lie. offset: from the file's start. dtype: safetensors' name."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    tensors: tuple[TensorMeta, ...]  # in the order of their bytes
    file_size: int
    digest: str  # sha256 of the header's bytes


class FileId(NamedTuple):
    """What changes when a file is written to or replaced. size: bytes."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileId:
        return cls(info.st_size, info.st_mtime_ns, info.st_ino)


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """tensors: by name. files: those that hold one, by name, as they were when they were read."""

    folder: Path
    tensors: dict[str, TensorMeta]
    files: dict[str, FileId]
    header_digest: str  # sha256 over the files' names, sizes and headers

    @classmethod
    def open(cls, folder: Path) -> CheckpointIndex:
        """Reads all headers. Raises CheckpointError, naming the file and what is wrong with it."""
        try:
            there = set(os.listdir(folder))
        except OSError as error:
            raise unreadable(str(folder), error) from error
        if SINGLE in there:
            weight_map, names = None, [SINGLE]
        elif INDEX in there:
            weight_map = _weight_map(folder)
            names = sorted(set(weight_map.values()))
        else:
            raise _no_weights(folder, there)
        headers: dict[str, Header] = {}
        files: dict[str, FileId] = {}
        tensors: dict[str, TensorMeta] = {}
        for name in names:
            headers[name], files[name] = read_header(folder / name, name)
            _add(tensors, headers[name])
        if weight_map is not None:
            _agree(weight_map, tensors)
        return cls(folder, tensors, files, _digest(headers))


def _no_weights(folder: Path, there: set[str]) -> CheckpointError:
    other = sorted(name for name in there if name.endswith(".bin"))
    hint = f"give a folder with `{INDEX}` and its shards"
    if other:
        hint = f"convert `{shown(other[0])}` to safetensors first"
    return CheckpointError(f"folder `{folder}` has neither `{SINGLE}` nor `{INDEX}`", hint)


def _weight_map(folder: Path) -> dict[str, str]:
    with open_file(folder / INDEX, INDEX) as file:
        data = read(file, MOST_BYTES + 1, INDEX)
    if len(data) > MOST_BYTES:
        raise damaged(INDEX, f"it has more than {MOST_BYTES} bytes")
    return parse_weight_map(data)


def parse_weight_map(data: bytes) -> dict[str, str]:
    """Tensor -> shard, from the index file's bytes. Raises CheckpointError."""
    found = parse_json(data, INDEX, fractions=True)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{INDEX}` has no `weight_map` of tensor to file", AGAIN)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"`{INDEX}` names no file for tensor `{shown(tensor)}`", AGAIN)
        if not _is_inside(shard):
            raise CheckpointError(
                f"`{INDEX}` names shard `{shown(shard)}`, which is outside the folder",
                "shards lie beside the index file; get the checkpoint from a source you trust",
            )
    return weight_map


def _is_inside(shard: str) -> bool:
    """By its text alone: the Hub's cache is made of symbolic links that lead elsewhere."""
    path = PurePosixPath(shard)
    odd = any(char in shard for char in "\\:") or not _is_name(shard)
    return bool(path.name) and not (path.is_absolute() or ".." in path.parts or odd)


def _is_name(text: str) -> bool:
    """Of a tensor or a file: short enough for a message, and safe to print."""
    return len(text) <= MOST_NAME and text.isprintable()


def _add(tensors: dict[str, TensorMeta], header: Header) -> None:
    for meta in header.tensors:
        if meta.name in tensors:
            raise CheckpointError(
                f"tensor `{meta.name}` is in two files, `{tensors[meta.name].file}` and "
                f"`{meta.file}`",
                "they are of different checkpoints: " + AGAIN,
            )
        tensors[meta.name] = meta
        if len(tensors) > MOST_TENSORS:
            raise CheckpointError(
                f"`{meta.file}` holds tensor `{meta.name}`, one more than {MOST_TENSORS}", AGAIN
            )


def _agree(weight_map: dict[str, str], tensors: dict[str, TensorMeta]) -> None:
    """The index file and the shards' headers must tell the same."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(
                f"tensor `{shown(name)}` is not in `{shard}`, where `{INDEX}` puts it",
                f"`{INDEX}` and the shards are of different checkpoints: {AGAIN}",
            )
    for name in tensors.keys() - weight_map.keys():
        raise CheckpointError(
            f"tensor `{name}` in `{tensors[name].file}` is not in `{INDEX}`",
            f"`{INDEX}` and the shards are of different checkpoints: {AGAIN}",
        )


def _digest(headers: dict[str, Header]) -> str:
    digest = hashlib.sha256()
    for name, header in headers.items():
        digest.update(f"{name}\0{header.file_size}\0{header.digest}\n".encode())
    return digest.hexdigest()


def read_header(path: Path, name: str) -> tuple[Header, FileId]:
    """The header of the file at `path`, which messages call `name`.

    Raises CheckpointError for anything but a whole, well-formed, regular file.
    """
    with open_file(path, name) as file:
        found = FileId.of(os.fstat(file.fileno()))
        start = read(file, 8, name)
        data = start + read(file, header_nbytes(start, name, found.size) - 8, name)
    return parse_header(data, name, found.size), found


def header_nbytes(start: bytes, name: str, file_size: int) -> int:
    """The bytes before the data, of a file that begins with `start` (8 bytes or more)."""
    if start.startswith(b"version "):
        raise CheckpointError(
            f"`{name}` is a pointer of Git LFS, not a safetensors file",
            "run `git lfs pull` in its folder",
        )
    length = int.from_bytes(start[:8], "little") if len(start) >= 8 else 0
    if file_size < 8 or length > MOST_HEADER_BYTES or length < 2:
        raise damaged(name, f"a header of {length} bytes in a file of {file_size}")
    if 8 + length > file_size:
        raise CheckpointError(
            f"`{name}` is cut short: it has {file_size} bytes, its header alone needs {8 + length}",
            AGAIN,
        )
    return 8 + length


def parse_header(data: bytes, name: str, file_size: int) -> Header:
    """The header of a file of `file_size` bytes that begins with `data`: header_nbytes or more."""
    stop = header_nbytes(data, name, file_size)
    if len(data) < stop:
        raise damaged(name, f"it ends at byte `{len(data)}`, in its header of {stop - 8} bytes")
    text = data[8:stop]
    if text[:1] != b"{":
        raise damaged(name, "the header does not start with `{`")
    tensors = _tensors(parse_json(text, name), name, stop)
    _check_layout(tensors, name, stop, file_size)
    return Header(tensors, file_size, hashlib.sha256(text).hexdigest())


def _tensors(header: dict[str, Any], name: str, data_start: int) -> tuple[TensorMeta, ...]:
    metadata = header.pop("__metadata__", {})
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if any(not isinstance(text, str) or HALVES.search(text) for text in texts):
        raise damaged(name, "`__metadata__` is no object of strings")
    found = [_tensor(key, entry, name, data_start) for key, entry in header.items()]
    return tuple(sorted(found, key=lambda meta: (meta.offset, meta.nbytes)))


def _tensor(key: str, entry: Any, name: str, data_start: int) -> TensorMeta:
    if not _is_name(key):
        raise damaged(name, f"a tensor has the name `{shown(key)}`")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(name, f"tensor `{key}` needs dtype, shape and data_offsets, and no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"`{name}` stores tensor `{key}` in dtype `{shown(dtype)}`, which is unknown",
            "tpx reads the dtypes of safetensors 0.8",
        )
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS or prod(n or 1 for n in shape) >> 63:
        raise damaged(name, f"tensor `{key}` has shape `{shown(shape)}`")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(name, f"tensor `{key}` has data_offsets `{shown(offsets)}`")
    start, stop = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (stop - start):
        needed = f"{bits} bits" if bits % 8 else bits // 8
        said = f"tensor `{key}`, {dtype} {shown(shape)}, has {stop - start} bytes for {needed}"
        raise damaged(name, said)
    return TensorMeta(key, name, dtype, tuple(shape), data_start + start, stop - start)


def _sizes(value: Any) -> bool:
    """A list of whole numbers that a file can hold; JSON's true and false are not numbers."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_layout(tensors: tuple[TensorMeta, ...], name: str, start: int, size: int) -> None:
    """Tensors lie one after another, and the file ends where the last one does."""
    end, last = start, "the header"
    for meta in tensors:
        if meta.offset != end:
            what = "overlaps" if meta.offset < end else "leaves a hole after"
            where = f"it begins at byte `{meta.offset}`, not at `{end}`"
            raise damaged(name, f"tensor `{meta.name}` {what} `{last}`: {where}")
        end, last = meta.offset + meta.nbytes, meta.name
    if size < end:
        first = next(meta for meta in tensors if meta.offset + meta.nbytes > size)
        raise CheckpointError(
            f"`{name}` is cut short: it has {size} bytes, its header promises {end}, and tensor "
            f"`{first.name}` is the first that is not whole",
            AGAIN,
        )
    if size > end:
        raise CheckpointError(
            f"`{name}` has {size - end} bytes more than its header describes ({size}, not {end})",
            AGAIN,
        )
