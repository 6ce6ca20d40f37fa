"""read/: exactly the bytes of a rank's plan, and the right values from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_plans import UNFILLED, Bare, drawn, item, read
from hypothesis import given, settings, strategies as st
from make_checkpoint import make_checkpoint
from reading import ids_of, load_rank, one_shard
from safetensors.torch import load_file, save_file
from sending import built, load_as_on_gpu
from tiny import tiny_config

from tpx.plan.find import shipped_plans
from tpx.plan.load import load_plan
from tpx.plan.prepare import prepare
from tpx.plan.spans import GAP, spans
from tpx.plan.types import Part, Shard
from tpx.read import DTYPES, Arena, Files, Limits, ReadStats, Ring, load_spans

CPU = torch.device("cpu")
WORLDS = {name: load_plan(path).mesh.world for name, path in shipped_plans("gpt_oss").items()}
EVERY_COMMIT = ("tp1", "ep2", "tp2-etp2", "tp4-etp4", "tp4-ep2-etp2")
PLANS = [
    pytest.param(name, world, marks=() if name in EVERY_COMMIT else pytest.mark.more)
    for name, world in sorted(WORLDS.items())
]


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read") / request.param
    return make_checkpoint(folder, tiny_config(vocab_size=131), seed=3, experts=request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("read") / "small", tiny_config(vocab_size=131))


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def byte_positions(part: Part) -> np.ndarray:
    """The file's bytes that a part names, by indexing a map of the whole tensor."""
    size = part.meta.nbytes // max(1, int(np.prod(part.meta.shape)))
    places = np.arange(part.meta.nbytes).reshape(*part.meta.shape, size)
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
        tensors, _ = load_rank(prepared, rank)
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
    tensors, _ = load_rank(prepare(str(small), "tp4-etp4", 4), 3)
    assert tensors["model.layers.0.mlp.experts.down_proj_blocks"].shape == (4, 64, 0, 16)


@pytest.mark.parametrize(("plan", "world"), [("tp2-ep2", 2), ("tp4-etp4", 4)])
def test_no_byte_outside_the_plan_is_needed(checkpoint, plan, world, tmp_path):
    prepared = prepare(str(checkpoint), plan, world)
    for rank in {0, world - 1}:
        expected, _ = load_rank(prepared, rank)
        rank_plan = prepared.rank_plan(rank)
        keep = {file.name: set() for file in checkpoint.glob("*.safetensors")}
        for shard in rank_plan.shards.values():
            for part in shard.parts:
                keep[part.meta.file].update(byte_positions(part).tolist())
        for name, kept in keep.items():
            good = np.frombuffer((checkpoint / name).read_bytes(), np.uint8)
            bad = np.full_like(good, 0xFF)
            places = np.array(sorted(kept), dtype=int)
            bad[places] = good[places]
            (tmp_path / name).write_bytes(bad.tobytes())
        found, stats = load_rank(prepared, rank, tmp_path)
        assert all(same_bits(found[name], expected[name]) for name in expected)
        assert stats.bytes_read == sum(span.nbytes for span in spans(rank_plan))
        assert stats.bytes_kept == sum(len(kept) for kept in keep.values())
        assert stats.bytes_kept == sum(tensor.nbytes for tensor in expected.values())


def test_a_wrong_plan_would_be_noticed(small, tmp_path):
    """The test above that spoils all other bytes can fail: one spoiled byte shows."""
    prepared = prepare(str(small), "tp2", 2)
    expected, _ = load_rank(prepared, 0)
    shard = prepared.rank_plan(0).shards["model.norm.weight"]
    for file in small.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    place = int(byte_positions(shard.parts[0])[5])
    data = bytearray((tmp_path / shard.parts[0].meta.file).read_bytes())
    data[place] ^= 0xFF
    (tmp_path / shard.parts[0].meta.file).write_bytes(data)
    found, _ = load_rank(prepared, 0, tmp_path)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == [
        "model.norm.weight"
    ]


def read_calls() -> int:
    """Bytes that this process has read, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_kernel_counts_the_same_bytes(tmp_path):
    folder = make_checkpoint(tmp_path, tiny_config(vocab_size=2000, hidden_size=256))
    prepared = prepare(str(folder), "tp2-etp2", 2)
    before = read_calls()
    _, stats = load_rank(prepared, 1)
    assert stats.bytes_read > 500_000
    assert stats.bytes_read <= read_calls() - before <= 1.01 * stats.bytes_read


def test_progress_grows_to_the_bytes_of_the_plan(small):
    steps = list[int]()
    prepared = prepare(str(small), "tp2", 2)
    _, stats = load_rank(prepared, 0, limits=Limits(2, 4096, 2), progress=steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == stats.bytes_read == sum(s.nbytes for s in spans(prepared.rank_plan(0)))


def as_held(data: bytes, shard: Shard, dtype: torch.dtype) -> torch.Tensor:
    """The shard's bytes as a tensor [numel], in the dtype that it is held in."""
    stored = torch.frombuffer(bytearray(data or b"\0" * 8), dtype=DTYPES[shard.dtype])
    return stored[: shard.numel].to(stored.dtype if stored.dtype == torch.uint8 else dtype)


@settings(max_examples=60, deadline=None)
@given(
    case=drawn(longest=2000),
    gap=st.sampled_from([0, 7, GAP]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    limits=st.sampled_from([Limits(1, 4096, 1), Limits(3, 8192, 2), Limits(2, 1 << 20, 1)]),
    load=st.sampled_from([load_spans, load_as_on_gpu, partial(load_as_on_gpu, library=built())]),
)
def test_any_ranges_land_where_the_plan_says_in_the_dtype_of_the_arena(
    tmp_path_factory, case, gap, dtype, limits, load
):
    [plan], files, [expected], _ = case
    folder = tmp_path_factory.mktemp("drawn")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    found = spans(plan, gap)
    filled = read(found, plan, {name: bytes(len(data)) for name, data in files.items()})
    arena, stats = Arena(plan, dtype, CPU), ReadStats()
    with Files(folder, ids_of(folder)) as source:
        load(found, source, arena, stats, limits)
        source.check()
    for name, shard in plan.shards.items():
        inside = torch.tensor(list(filled[name])).view(-1, item(shard.dtype))[:, 0] != UNFILLED
        want = as_held(expected[name], shard, dtype)[inside]
        got = arena.flat(name)[inside]
        assert got.dtype == want.dtype
        assert torch.equal(got.nan_to_num(nan=7), want.nan_to_num(nan=7)), name
        assert arena.view(name).shape == shard.shape
    assert stats.bytes_read == sum(span.nbytes for span in found)
    assert stats.bytes_kept == sum(copy.kept for span in found for copy in span.copies)


def test_memory_beyond_the_arena_is_the_rings(tmp_path):
    """24 MB in bfloat16 that are cast to float32, so that every byte goes through the ring."""
    shards: Mapping[str, Shard] = one_shard((12 << 20,), "BF16")
    (tmp_path / "file").write_bytes(bytes(24 << 20))
    stats = ReadStats()
    arena = Arena(Bare(dict(shards)), torch.float32, CPU)
    with Files(tmp_path, ids_of(tmp_path)) as source:
        load_spans(spans(Bare(dict(shards))), source, arena, stats)
    assert arena.data.nbytes == 48 << 20
    assert 8 << 20 < stats.host_peak - arena.data.nbytes <= 32 << 20


def test_a_closed_ring_lets_all_who_wait_go():
    ring = Ring(1, 4096)
    first = ring.take()
    assert first is not None
    ring.close()
    assert ring.take() is None
    assert ring.take() is None


def test_names_of_types_match_those_that_the_library_writes(tmp_path):
    tensors = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in DTYPES.values()}
    save_file(tensors, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {header[str(dtype)]["dtype"]: dtype for dtype in DTYPES.values()} == DTYPES
