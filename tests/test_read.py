"""read.py: exactly the bytes of a rank's plan, and the right values from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from make_checkpoint import make_checkpoint
from safetensors.torch import load_file
from tiny import tiny_config

from tpx import read
from tpx.errors import CheckpointError
from tpx.index import TensorMeta
from tpx.plan.prepare import Prepared, prepare
from tpx.plan.types import Part, Shard
from tpx.read import ReadStats, chunks, read_shards, runs

ROOT = Path(__file__).parent.parent
PLANS = [("tp1", 1), ("tp2", 2), ("ep2", 2), ("tp2-etp2", 2), ("tp4-etp4", 4), ("tp4-ep2-etp2", 4)]
PLANS += [("dp2-ep2", 2), ("tp4-ep4", 4)]


class Bare:
    """As much of a RankPlan as reading needs."""

    def __init__(self, shards: dict[str, Shard]):
        self.shards = shards


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read") / request.param
    return make_checkpoint(folder, tiny_config(vocab_size=131), seed=3, experts=request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("read") / "small", tiny_config(vocab_size=131))


def read_rank(prepared: Prepared, rank: int, folder: Path | None = None) -> tuple[dict, ReadStats]:
    stats = ReadStats()
    plan = prepared.rank_plan(rank)
    return dict(read_shards(plan, folder or prepared.folder, stats)), stats


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def byte_positions(part: Part) -> np.ndarray:
    """The file's bytes that a part names, by indexing a map of the whole tensor."""
    item = part.meta.nbytes // max(1, int(np.prod(part.meta.shape)))
    places = np.arange(part.meta.nbytes).reshape(*part.meta.shape, item)
    for axis, ranges in enumerate(part.index):
        chosen = [i for start, stop in ranges for i in range(start, stop)]
        places = np.take(places, np.array(chosen, dtype=int), axis)
    return part.meta.offset + places.reshape(-1)


@pytest.mark.parametrize(("plan", "world"), PLANS)
def test_shards_of_all_ranks_make_up_the_checkpoint(checkpoint, plan, world):
    prepared = prepare(str(checkpoint), plan, world)
    whole = whole_tensors(checkpoint)
    seen = {name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in whole.items()}
    for rank in range(world):
        tensors, _ = read_rank(prepared, rank)
        shards = prepared.rank_plan(rank).shards
        assert tensors.keys() == shards.keys() == whole.keys()
        for name, tensor in tensors.items():
            places = [[i for r in ranges for i in range(*r)] for ranges in shards[name].ranges]
            grid = np.ix_(*places)
            assert same_bits(tensor, whole[name][grid].reshape(tensor.shape)), (name, rank)
            seen[name][grid] += 1
    for name, times in seen.items():
        assert len(times.unique()) == 1, f"{name}: some elements on more ranks than others"
        assert times.min() >= 1, name


def test_a_rank_without_a_block_gets_an_empty_shard(small):
    prepared = prepare(str(small), "tp4-etp4", 4)
    tensors, _ = read_rank(prepared, 3)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    assert tensors[name].shape == (4, 64, 0, 16)


@pytest.mark.parametrize(("plan", "world"), PLANS)
def test_no_byte_outside_the_plan_is_needed(checkpoint, plan, world, tmp_path):
    prepared = prepare(str(checkpoint), plan, world)
    for rank in {0, world - 1}:
        expected, _ = read_rank(prepared, rank)
        keep = {file.name: set() for file in checkpoint.glob("*.safetensors")}
        for shard in prepared.rank_plan(rank).shards.values():
            for part in shard.parts:
                keep[part.meta.file].update(byte_positions(part).tolist())
        for name, kept in keep.items():
            good = np.frombuffer((checkpoint / name).read_bytes(), np.uint8)
            bad = np.full_like(good, 0xFF)
            places = np.array(sorted(kept), dtype=int)
            bad[places] = good[places]
            (tmp_path / name).write_bytes(bad.tobytes())
        found, stats = read_rank(prepared, rank, tmp_path)
        assert all(same_bits(found[name], expected[name]) for name in expected)
        assert stats.bytes_read == sum(len(kept) for kept in keep.values())
        assert stats.bytes_kept == sum(tensor.nbytes for tensor in expected.values())


COUNT = """
import sys
from pathlib import Path
from tpx.plan.prepare import prepare
from tpx.read import ReadStats, chunks, read_shards, runs

def rchar():
    return int(Path("/proc/self/io").read_text().split()[1])

prepared = prepare(sys.argv[1], sys.argv[2], int(sys.argv[3]))
plan, stats = prepared.rank_plan(int(sys.argv[4])), ReadStats()
before = rchar()
for name, tensor in read_shards(plan, prepared.folder, stats):
    del tensor
print(rchar() - before, stats.bytes_read, stats.bytes_kept)
"""


@pytest.mark.parametrize(("plan", "world", "rank"), [("tp2-etp2", 2, 1), ("tp4-ep4", 4, 3)])
def test_the_kernel_counts_the_same_bytes(tmp_path, plan, world, rank):
    config = tiny_config(vocab_size=2000, hidden_size=256)
    folder = make_checkpoint(tmp_path, config)
    command = [sys.executable, "-c", COUNT, str(folder), plan, str(world), str(rank)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    rchar, counted, kept = map(int, out.split())
    assert counted == kept > 500_000
    assert abs(rchar - counted) <= 0.01 * counted


def test_progress_grows_to_the_bytes_of_the_plan(small):
    prepared, steps = prepare(str(small), "tp2", 2), []
    stats = ReadStats()
    list(read_shards(prepared.rank_plan(0), small, stats, lambda *step: steps.append(step)))
    done, total = zip(*steps, strict=True)
    assert list(done) == sorted(done)
    assert set(total) == {done[-1]} == {stats.bytes_read}


def test_a_file_cut_short_after_its_headers_were_checked_is_an_error(small, tmp_path):
    prepared = prepare(str(small), "tp1", 1)
    meta = prepared.index.tensors["lm_head.weight"]
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    os.truncate(tmp_path / meta.file, meta.offset + 100)
    with pytest.raises(CheckpointError) as caught:
        read_rank(prepared, 0, tmp_path)
    assert caught.value.message.startswith(f"`{meta.file}` ends at byte `{meta.offset + 100}`, in")
    assert caught.value.hint == (
        "the file was cut short after its headers were checked; fetch it again"
    )


def test_a_file_that_has_gone_is_an_error(small, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_rank(prepare(str(small), "tp1", 1), 0, tmp_path)
    first = tmp_path / "model-00000-of-00001.safetensors"
    assert caught.value.message == f"`{first}` cannot be opened: No such file or directory"


@st.composite
def fused(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[tuple[int, int]]]]:
    """A tensor's shape, and up to three ranges of each of its dimensions, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    index = []
    for size in shape:
        if draw(st.booleans()):
            index.append([(0, size)])
            continue
        points = st.lists(st.integers(0, size), min_size=2, max_size=2).map(sorted)
        index.append([tuple(pair) for pair in draw(st.lists(points, max_size=3))])
    return shape, index


@settings(max_examples=150, deadline=None)
@given(
    tensor=fused(),
    lead=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=2),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    chunk=st.sampled_from([1, 3, 16, 1 << 20]),
)
def test_any_ranges_of_a_tensor_land_where_the_part_says(
    tmp_path_factory, tensor, lead, before, after, chunk
):
    """lead: dimensions that the shard has and the tensor has not; before, after: margins in the
    tensor's own first dimension."""
    shape, index = tensor
    folder = tmp_path_factory.mktemp("part")
    values = np.random.default_rng(0).integers(0, 2**16, shape, dtype=np.uint16)
    (folder / "file").write_bytes(b"head" + values.tobytes())
    meta = TensorMeta("t", "file", "BF16", shape, 4, values.nbytes)
    rows = [[i for start, stop in ranges for i in range(start, stop)] for ranges in index]
    chosen = values[np.ix_(*(np.array(r, dtype=int) for r in rows))]
    lead_shape = tuple(size + at for size, at in lead)
    target = (*lead_shape, before + chosen.shape[0] + after, *chosen.shape[1:])
    at = (*(at for _, at in lead), before, *(0,) * (len(shape) - 1))
    part = Part(meta, tuple(map(tuple, index)), at)
    shard = Shard(target, "BF16", (part,), "replicate", 1, ())
    stats = ReadStats()
    [(_, found)] = read_shards(Bare({"p": shard}), folder, stats)
    inside = tuple(at for _, at in lead)
    got = found.view(torch.int16).numpy().view(np.uint16)[inside]
    assert np.array_equal(got[before : before + chosen.shape[0]], chosen)
    assert stats.bytes_read == chosen.nbytes
    assert stats.bytes_kept == found.nbytes
    file = (folder / "file").read_bytes()
    copied = bytearray(found.nbytes)
    for job in chunks(runs(part, shard), chunk):
        for source, to, nbytes in zip(*job, strict=True):
            assert 0 < nbytes <= chunk
            copied[to : to + nbytes] = file[source : source + nbytes]
    cut = np.frombuffer(copied, np.uint16).reshape(target)[inside]
    assert np.array_equal(cut[before : before + chosen.shape[0]], chosen)


def test_a_wrong_plan_would_be_noticed(small, tmp_path):
    """The test above that spoils all other bytes can fail: one spoiled byte shows."""
    prepared = prepare(str(small), "tp2", 2)
    expected, _ = read_rank(prepared, 0)
    shard = prepared.rank_plan(0).shards["model.norm.weight"]
    for file in small.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    place = int(byte_positions(shard.parts[0])[5])
    data = bytearray((tmp_path / shard.parts[0].meta.file).read_bytes())
    data[place] ^= 0xFF
    (tmp_path / shard.parts[0].meta.file).write_bytes(data)
    found, _ = read_rank(prepared, 0, tmp_path)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == [
        "model.norm.weight"
    ]


def test_names_of_types_match_those_that_the_library_writes(tmp_path):
    from safetensors.torch import save_file

    tensors = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in read.DTYPES.values()}
    save_file(tensors, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {header[str(dtype)]["dtype"]: dtype for dtype in read.DTYPES.values()} == read.DTYPES
