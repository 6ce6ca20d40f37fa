"""CheckpointIndex: what tensors a folder of safetensors files holds, from their headers alone.

Reads no data. A file that is damaged, cut short or not what the index file says is refused here,
so that no rank can meet it later: stricter than the safetensors package (tests/test_index.py has a
case for each check). Knows no model family and no plan.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "download the checkpoint again, whole"
MOST_HEADER_BYTES = 100_000_000  # as in the format's own implementation
MOST_DIMENSIONS = 32
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
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


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """tensors: by name. files: size in bytes of each file that holds one, by name."""

    folder: Path
    tensors: dict[str, TensorMeta]
    files: dict[str, int]
    header_digest: str  # sha256 over the files' names, sizes and headers

    @classmethod
    def open(cls, folder: Path) -> CheckpointIndex:
        """Reads all headers. Raises CheckpointError, naming the file and what is wrong with it."""
        if (folder / SINGLE).exists():
            weight_map, names = None, [SINGLE]
        elif (folder / INDEX).exists():
            weight_map = _weight_map(folder)
            names = sorted(set(weight_map.values()))
        else:
            raise _no_weights(folder)
        headers = {name: _header(folder, name) for name in names}
        tensors = _merge(headers)
        if weight_map is not None:
            _agree(weight_map, tensors)
        files = {name: header.file_size for name, header in headers.items()}
        return cls(folder, tensors, files, _digest(headers))


def _no_weights(folder: Path) -> CheckpointError:
    other = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    hint = f"give a folder with `{INDEX}` and its shards"
    if other:
        hint = f"convert `{other[0]}` to safetensors first"
    return CheckpointError(f"folder `{folder}` has neither `{SINGLE}` nor `{INDEX}`", hint)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> shard, from the index file."""
    try:
        data = (folder / INDEX).read_bytes()
    except OSError as error:
        raise CheckpointError(f"`{INDEX}` cannot be read: {error.strerror}") from error
    found = parse_json(data, INDEX)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{INDEX}` has no `weight_map` of tensor to file", AGAIN)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"`{INDEX}` names no file for tensor `{tensor}`", AGAIN)
        if not _is_inside(shard):
            raise CheckpointError(
                f"`{INDEX}` names shard `{shard}`, which is outside the folder",
                "shards lie beside the index file; get the checkpoint from a source you trust",
            )
    return weight_map


def _is_inside(shard: str) -> bool:
    """By its text alone: the Hub's cache is made of symbolic links that lead elsewhere."""
    path = PurePosixPath(shard)
    odd = any(char in shard for char in "\\\0:")
    return bool(path.name) and not (path.is_absolute() or ".." in path.parts or odd)


def _header(folder: Path, name: str) -> Header:
    try:
        return read_header(folder / name, name)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"shard `{name}` is missing from folder `{folder}`, and `{INDEX}` names it", AGAIN
        ) from error
    except OSError as error:
        raise CheckpointError(f"shard `{name}` cannot be read: {error.strerror}") from error


def _merge(headers: dict[str, Header]) -> dict[str, TensorMeta]:
    tensors: dict[str, TensorMeta] = {}
    for header in headers.values():
        for meta in header.tensors:
            if meta.name in tensors:
                raise CheckpointError(
                    f"tensor `{meta.name}` is in two files, `{tensors[meta.name].file}` and "
                    f"`{meta.file}`",
                    "they are of different checkpoints: " + AGAIN,
                )
            tensors[meta.name] = meta
    return tensors


def _agree(weight_map: dict[str, str], tensors: dict[str, TensorMeta]) -> None:
    """The index file and the shards' headers must tell the same."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(
                f"tensor `{name}` is not in `{shard}`, where `{INDEX}` puts it",
                f"`{INDEX}` and the shards are of different checkpoints: {AGAIN}",
            )
    for name in tensors.keys() - weight_map.keys():
        raise CheckpointError(
            f"tensor `{name}` in `{tensors[name].file}` is not in `{INDEX}`",
            f"`{INDEX}` and the shards are of different checkpoints: {AGAIN}",
        )


def _digest(headers: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, header in headers.items():
        digest.update(f"{name}\0{header.file_size}\0{header.digest}\n".encode())
    return digest.hexdigest()


def read_header(path: Path, name: str) -> Header:
    """The header of the file at `path`, which messages call `name`.

    Raises CheckpointError for anything but a whole, well-formed file; OSError passes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start.startswith(b"version "):
            raise CheckpointError(
                f"`{name}` is a pointer of Git LFS, not a safetensors file",
                "run `git lfs pull` in its folder",
            )
        if size < 8 or length > MOST_HEADER_BYTES or length < 2:
            raise _bad(name, f"a header of {length} bytes in a file of {size}")
        if length > size - 8:
            raise CheckpointError(
                f"`{name}` is cut short: it has {size} bytes, its header alone needs {length + 8}",
                AGAIN,
            )
        data = file.read(length)
    if len(data) != length or data[:1] != b"{":
        raise _bad(name, "the header does not start with `{`")
    tensors = _tensors(parse_json(data, name), name, 8 + length)
    _check_layout(tensors, name, 8 + length, size)
    return Header(tensors, size, hashlib.sha256(data).hexdigest())


def parse_json(data: bytes, name: str) -> Any:
    """Strict JSON: UTF-8, no key twice, no fractions, no NaN, no depth that exhausts the parser."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _bad(name, f"key `{twice}` appears twice")
        return found

    def refuse(text: str) -> Any:
        raise _bad(name, f"`{text}` where only whole numbers belong")

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=refuse,
            parse_float=lambda text: float(text) if name.endswith(".json") else refuse(text),
        )
    except UnicodeDecodeError as error:
        raise _bad(name, f"byte {error.start} of the JSON is not UTF-8") from error
    except RecursionError as error:
        raise _bad(name, "the JSON is nested too deep") from error
    except ValueError as error:  # JSONDecodeError, or an integer too long to convert
        raise _bad(name, f"the JSON does not parse: {error}") from error


def _bad(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"`{name}` is damaged: {what}", AGAIN)


def _tensors(header: Any, name: str, data_start: int) -> tuple[TensorMeta, ...]:
    if not isinstance(header, dict):
        raise _bad(name, "the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise _bad(name, "`__metadata__` is no object of strings")
    found = [_tensor(key, entry, name, data_start) for key, entry in header.items()]
    return tuple(sorted(found, key=lambda meta: (meta.offset, meta.nbytes)))


def _tensor(key: str, entry: Any, name: str, data_start: int) -> TensorMeta:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(name, f"tensor `{key}` needs dtype, shape and data_offsets, and no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"`{name}` stores tensor `{key}` in dtype `{dtype}`, which is unknown",
            "tpx reads the dtypes of safetensors 0.8",
        )
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise _bad(name, f"tensor `{key}` has shape `{shape}`")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(name, f"tensor `{key}` has data_offsets `{offsets}`")
    start, stop = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (stop - start):
        raise _bad(
            name, f"tensor `{key}`, {dtype} {shape}, has {stop - start} bytes for {bits / 8:g}"
        )
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
            raise _bad(name, f"tensor `{meta.name}` {what} `{last}`")
        end, last = meta.offset + meta.nbytes, meta.name
    if size < end:
        raise CheckpointError(
            f"`{name}` is cut short: it has {size} bytes, its header promises {end}", AGAIN
        )
    if size > end:
        raise CheckpointError(
            f"`{name}` has {size - end} bytes more than its header describes ({size}, not {end})",
            AGAIN,
        )
