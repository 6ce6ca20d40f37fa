"""Sparse files: blocks are listed once they are on the disk, and a manifest never says more."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings, strategies as st

from tpx.hub.source import Found
from tpx.hub.sparse import BLOCK, Hashes, SparseFile, read_manifest, runs, trusted

SIZE = 2 * BLOCK + 12_345
DATA = random.Random(0).randbytes(SIZE)
FOUND = Found(SIZE, "etag")
BLOCKS = [DATA[start : start + BLOCK] for start in range(0, SIZE, BLOCK)]
DIGESTS = [hashlib.sha256(block).hexdigest() for block in BLOCKS]


def open_file(folder: Path, found: Found = FOUND) -> SparseFile:
    return SparseFile(folder / "file", folder / "manifest", found)


def write(file: SparseFile, number: int) -> None:
    file.write(BLOCKS[number], number * BLOCK)
    file.add_blocks(number, [DIGESTS[number]])


@given(st.sets(st.integers(0, 60)), st.integers(1, 9))
def test_runs_are_neighbours_in_order(numbers, most):
    found = list(runs(sorted(numbers), most))
    assert [number for run in found for number in run] == sorted(numbers)
    assert all(1 <= len(run) <= most for run in found)
    for one, other in pairwise(found):
        assert one.stop < other.start or len(one) == most


@settings(max_examples=20)
@given(st.lists(st.integers(1, SIZE), max_size=9), st.integers(0, 2))
def test_hashes_do_not_depend_on_the_pieces(cuts, first):
    hashes = Hashes(first, SIZE)
    places = sorted({first * BLOCK, SIZE, *(cut for cut in cuts if cut > first * BLOCK)})
    for start, stop in pairwise(places):
        hashes.feed(DATA[start:stop])
    assert hashes.digests == DIGESTS[first:]


def test_a_file_grows_block_by_block(tmp_path):
    with open_file(tmp_path) as file:
        write(file, 2)
        file.add_header(DATA[:100])
    manifest = read_manifest(tmp_path / "manifest")
    assert trusted(tmp_path / "file", manifest, FOUND) == manifest
    assert (manifest.blocks, manifest.header.nbytes) == ({2: DIGESTS[2]}, 100)
    with open_file(tmp_path) as file:
        assert file.header == manifest.header
        write(file, 0)
    assert read_manifest(tmp_path / "manifest").blocks == {2: DIGESTS[2], 0: DIGESTS[0]}
    assert (tmp_path / "file").read_bytes() == BLOCKS[0] + bytes(BLOCK) + BLOCKS[2]


def test_without_a_seal_nothing_is_trusted_that_is_not_hashed(tmp_path):
    file = open_file(tmp_path)
    write(file, 0)
    write(file, 1)
    file.add_header(DATA[:100])
    manifest = read_manifest(tmp_path / "manifest")  # as a killed process leaves it
    assert trusted(tmp_path / "file", manifest, FOUND) is None
    with file:
        file.write(b"damaged", 50)
    again = (tmp_path / "manifest").read_text().splitlines(keepends=True)
    (tmp_path / "manifest").write_text("".join(again[:-1]))
    with open_file(tmp_path) as file:
        assert (file.header, file.blocks) == (None, {1: DIGESTS[1]})


@pytest.mark.parametrize("found", [Found(SIZE, "other"), Found(SIZE + 1, "etag")])
def test_blocks_of_other_content_are_dropped(tmp_path, found):
    with open_file(tmp_path) as file:
        write(file, 0)
    with open_file(tmp_path, found) as file:
        assert (file.blocks, file.header) == ({}, None)
    assert read_manifest(tmp_path / "manifest").found == found


@settings(max_examples=20)
@given(st.data())
def test_no_damage_to_a_manifest_makes_a_hole_look_full(data):
    """Block 0 is there, 1 and 2 are holes: whatever the manifest becomes, they are fetched."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        with open_file(folder) as file:
            write(file, 0)
        text = (folder / "manifest").read_bytes()
        cut = data.draw(st.integers(0, len(text)))
        junk = data.draw(
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from([b"block 1 " + 64 * b"0" + b"\n", b"block 7 " + 64 * b"f" + b"\n"]),
            )
        )
        (folder / "manifest").write_bytes(text[:cut] + junk)
        with open_file(folder) as file:
            assert file.blocks.items() <= {0: DIGESTS[0]}.items()
