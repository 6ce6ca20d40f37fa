"""Headers that nobody would write, and what any of them may lead to: a table of tensors that lies
in the file, or one CheckpointError, soon.

As a script it is a coverage-guided fuzzer (atheris): `python tests/fuzz_headers.py -runs=100000`.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any

import safetensors

import tpx.index
import tpx.strict_json
from tpx.errors import CheckpointError
from tpx.index import DTYPE_BITS, CheckpointIndex, Header, parse_header

SECOND = 1.0
MOST_DATA = 1 << 16  # bytes that are made for the format's own package to read


class Raw(str):
    """Text that stands in the JSON as it is."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object, in which a key may appear twice."""


ODD: list[Any] = [0, 1, -1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, 0.5]
ODD += [True, False, None, "", "a", "__metadata__", "dtype", "NaN", "F4", "BF17", "\ud800", "\0"]
ODD += ["\x1b[2J", "../../etc/passwd", "n" * 2000, "é", "\U0001f600", [], Pairs(), [[]], [0, 8]]
ODD += [*map(Raw, ("NaN", "-Infinity", "-0", "1e5", "1E400", "00", "+1", "'a'", "", "//", "0x8"))]
ODD += [Raw("9" * 5000), Raw("[" * 3000), Raw("[" * 900 + "]" * 900), Raw('{"a":' * 3000)]
BYTES = b'{}[],:"\\0123456789eE+-.tfnu \n\0\x80\xff\xed\xa0\xef\xbb\xbf'


def sound(draw: random.Random) -> Pairs:
    """A header as it should be."""
    tree, at = Pairs(), 0
    for number in range(draw.randint(0, 4)):
        dtype = draw.choice(list(DTYPE_BITS))
        shape = [draw.choice([0, 1, 2, 3, 8]) for _ in range(draw.randint(0, 3))]
        if prod(shape) * DTYPE_BITS[dtype] % 8:
            shape.append(8)
        stop = at + prod(shape) * DTYPE_BITS[dtype] // 8
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [at, stop])]
        draw.shuffle(fields)
        tree.append((f"t.{number}", Pairs(fields)))
        at = stop
    draw.shuffle(tree)
    if draw.random() < 0.3:
        tree.insert(0, ("__metadata__", Pairs([("format", "pt")])))
    return tree


def places(tree: Any) -> Iterator[tuple[Any, int]]:
    """Every object's and every list's entries: the one that holds it, and which it is."""
    for at, entry in enumerate(tree):
        yield tree, at
        value = entry[1] if isinstance(tree, Pairs) else entry
        if isinstance(value, list):
            yield from places(value)


def mutate(draw: random.Random, tree: Any) -> None:
    """One change: an entry goes, comes twice, changes places, or its key or value is an odd one."""
    found = list(places(tree))
    if not found:
        tree.append(("a", deepcopy(draw.choice(ODD))))
        return
    owner, at = draw.choice(found)
    keyed = isinstance(owner, Pairs)
    kind = draw.randrange(7)
    if kind == 0:
        del owner[at]
    elif kind == 1:
        owner.insert(at, owner[at])
    elif kind == 2:
        owner.insert(draw.randrange(len(owner)), owner.pop(at))
    elif kind == 3 and keyed:
        other = draw.choice([*ODD, *owner])
        owner[at] = (other if type(other) is str else "b", owner[at][1])
    elif kind == 4 and type(owner[at]) is int:
        owner[at] += draw.choice([-8, -1, 1, 8])
    else:
        value = deepcopy(draw.choice(ODD))
        owner[at] = (owner[at][0], value) if keyed else value


def written(tree: Any) -> str:
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{written(v)}" for key, v in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(written, tree)) + "]"
    return json.dumps(tree)


def scratched(draw: random.Random, text: bytes) -> bytes:
    """With a few bytes changed, added or gone."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text) + 1)
        new = bytes(draw.choices(BYTES, k=draw.randint(0, 2)))
        text = text[:at] + new + text[at + draw.randint(0, 2) :]
    return text


def damaged(draw: random.Random) -> tuple[bytes, int]:
    """A file's first bytes and its size: a sound header with some changes."""
    tree = sound(draw)
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        mutate(draw, tree)
    text = written(tree).encode()
    if draw.random() < 0.2:
        text = scratched(draw, text)
    rarely = [0] * 12
    longer = draw.choice([*rarely, -1, 1, -9, 9, 10**8, 2**62])
    bigger = draw.choice([*rarely, -1, 1, -len(text), 10**9])
    return file_of(text, longer, bigger)


def file_of(text: bytes, longer: int = 0, bigger: int = 0) -> tuple[bytes, int]:
    """The file's bytes before its data, and the size that its offsets ask for; but for errors of
    `longer` in the length, and of `bigger` in the size."""
    ends = re.findall(rb'"data_offsets":\s*\[\s*\d+\s*,\s*(\d{1,19})\s*\]', text)
    size = 8 + len(text) + max(map(int, ends), default=0) + bigger
    return max(0, len(text) + longer).to_bytes(8, "little") + text, max(0, size)


def judge(data: bytes, size: int) -> Header | None:
    """None where the header was refused, as it may be. AssertionError for all other outcomes."""
    begin = time.process_time()
    try:
        header = parse_header(data, "f", size)
    except CheckpointError as error:
        check_error(error)
        header = None
    assert time.process_time() - begin < SECOND
    if header is not None:
        check_table(header, data, size)
    return header


def check_error(error: CheckpointError) -> None:
    """It can be printed, in a few lines, and says what to do."""
    assert error.message.isprintable(), ascii(error.message)
    assert error.hint
    assert len(error.render().encode()) < 4000


def check_table(header: Header, data: bytes, size: int) -> None:
    """Tensors fill the file from the header to its end, and the format's own package agrees."""
    at = 8 + int.from_bytes(data[:8], "little")
    for meta in header.tensors:
        assert meta.offset == at
        assert 8 * meta.nbytes == prod(meta.shape) * DTYPE_BITS[meta.dtype]
        at += meta.nbytes
    assert at == size == header.file_size
    assert len({meta.name for meta in header.tensors}) == len(header.tensors)
    if size <= MOST_DATA:
        theirs = dict(safetensors.deserialize(data.ljust(size, b"\0")[:size]))
        ours = {meta.name: (meta.dtype, list(meta.shape)) for meta in header.tensors}
        assert {name: (one["dtype"], one["shape"]) for name, one in theirs.items()} == ours


def write_damaged(draw: random.Random, folder: Path) -> None:
    """A folder of two shards and their index file, of which something is changed."""
    names, where = ["1.safetensors", "2.safetensors"], Pairs()
    for name in names:
        tree = Pairs((f"{name[0]}.{key}", entry) for key, entry in sound(draw) if key[0] == "t")
        where.extend((key, name) for key, _ in tree)
        if draw.random() < 0.1:
            mutate(draw, tree)
        data, size = file_of(written(tree).encode())
        with (folder / name).open("wb") as file:
            file.write(data)
            file.truncate(min(size, MOST_DATA))
    tree = Pairs([("metadata", Pairs([("total_size", 1.5)])), ("weight_map", where)])
    for _ in range(draw.randint(0, 2)):
        mutate(draw, tree)
    (folder / tpx.index.INDEX).write_bytes(written(tree).encode())


def judge_folder(folder: Path) -> CheckpointIndex | None:
    """None where the folder was refused, as it may be. AssertionError for all other outcomes."""
    begin = time.process_time()
    try:
        index = CheckpointIndex.open(folder)
    except CheckpointError as error:
        check_error(error)
        index = None
    assert time.process_time() - begin < SECOND
    if index is not None:
        for meta in index.tensors.values():
            assert meta.offset + meta.nbytes <= (folder / meta.file).stat().st_size
    return index


def fuzz(arguments: list[str]) -> None:
    """libFuzzer's arguments, a folder for what it finds among them. Does not return.

    An input is a header's text, behind two bytes that change its length and the file's size.
    """
    import atheris

    def judge_input(given: bytes) -> None:
        if len(given) >= 2:
            judge(*file_of(given[2:], *(byte - 256 * (byte > 127) for byte in given[:2])))

    def mutate_input(given: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.4:
            return atheris.Mutate(given, most)
        tree = sound(draw)
        with suppress(ValueError, RecursionError):
            found = json.loads(given[2:], object_pairs_hook=Pairs)
            tree = found if isinstance(found, Pairs) else tree
            mutate(draw, tree)
            return (given[:2] + written(tree).encode())[:most]
        return b"\0\0" + written(sound(draw)).encode()

    for module in (tpx.index, tpx.strict_json):
        for value in vars(module).values():
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                atheris.instrument_func(value)  # in its place
    atheris.Setup([sys.argv[0], *arguments], judge_input, custom_mutator=mutate_input)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1:])
