"""The CPU's own operations: against the references, bit for bit beside other rows and threads, and
how they are built."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from parity import DEMO, TOLERANCE, prompts, relative_error

import tpx
from tpx.mxfp4 import Mxfp4, dequantize, quantize
from tpx.ops.by_expert import inverse, sort_by_expert
from tpx.ops.cpu import build, native
from tpx.ops.cpu.calls import Native, _native
from tpx.ops.linear import linear

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


@pytest.fixture(scope="module")
def ops() -> Native:
    found = _native()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_product(got, x, w, bias):
    """Against float64. Each lane adds K/8 products, three more additions join the lanes and one
    adds the bias, so in float32 the error is at most K/8 + 5 half units of the sum of magnitudes;
    then the result is rounded to its own dtype."""
    x, w, bias = x.double(), w.double(), bias.double()
    exact = x @ w.t() + bias
    sizes = x.abs() @ w.abs().t() + bias.abs()
    bound = (x.shape[1] / 8 + 5) * 2**-24 * sizes + HALF_UNIT[got.dtype] * exact.abs() * 1.01
    assert ((got.double() - exact).abs() <= bound).all()


@FLOATS
@pytest.mark.parametrize("counts", [[1, 0, 2, 3], [4, 5, 0, 6], [7, 8, 9, 17], [0, 0, 70, 0]])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 32), (64, 96), (131, 256)])
def test_grouped_rows_are_within_the_stated_bound(ops, dtype, counts, outputs, inputs):
    weight = quantize(random(4, outputs, inputs))
    x, bias = random(sum(counts) + 2, inputs, dtype=dtype, seed=1), random(4, outputs, dtype=dtype)
    got = ops.grouped_mm(x, counts, weight, bias)
    full = dequantize(weight, torch.float64)
    start = 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        check_product(got[rows], x[rows], full[e], bias[e])
        start += count
    assert not got[start:].any()


def test_every_byte_and_scale_is_unpacked_exactly(ops):
    """One-hot rows pick single values: all 256 bytes, with the smallest and the largest scales."""
    scales = torch.tensor([0, 1, 2, 126, 127, 128, 251, 252], dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).expand(1, 16, 8, 16)
    weight = Mxfp4(blocks.contiguous(), scales.expand(1, 16, 8).contiguous())
    got = ops.grouped_mm(torch.eye(256), [256], weight, None)
    assert torch.equal(got, dequantize(weight, torch.float32)[0].t())


def test_scale_255_is_not_a_number(ops):
    weight = Mxfp4(torch.zeros(1, 4, 1, 16, dtype=torch.uint8), torch.full((1, 4, 1), 255).byte())
    assert ops.grouped_mm(torch.ones(3, 32), [3], weight, None).isnan().all()


@FLOATS
def test_neither_neighbours_nor_threads_nor_repetition_change_a_bit(ops, dtype):
    weight, dense = quantize(random(3, 300, 128)), random(300, 128, dtype=dtype)
    x, bias = random(60, 128, dtype=dtype), random(3, 300, dtype=dtype)
    alone = torch.cat([ops.grouped_mm(row, [0, 1, 0], weight, bias) for row in x.split(1)])
    plain = torch.cat([ops.linear(row, dense, None) for row in x.split(1)])
    cache = random(30, 4, 2, 16, dtype=dtype)
    tables, sinks = torch.arange(30, dtype=torch.int32).view(2, 15), random(4, dtype=dtype)
    starts, lengths = torch.tensor([0, 20, 60]).int(), torch.tensor([50, 60]).int()
    batch = tables, starts, lengths, 13, sinks
    seen = ops.attention(x.view(60, 4, 32)[..., :16], cache, cache, *batch)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (2, 3, 5, 8, 9, 13, 60):
                got = ops.grouped_mm(x[:rows], [0, rows, 0], weight, bias)
                assert torch.equal(got, alone[:rows])
                assert torch.equal(ops.linear(x[:rows], dense, None), plain[:rows])
            again = ops.attention(x.view(60, 4, 32)[..., :16], cache, cache, *batch)
            assert torch.equal(again, seen)
    finally:
        torch.set_num_threads(before)


@FLOATS
@pytest.mark.parametrize("rows", [0, 1, 2, 6, 8, 19])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 32), (131, 96), (64, 40)])
def test_linear_is_within_the_bound_whoever_computes_it(ops, dtype, rows, outputs, inputs):
    x, w = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    bias = random(outputs, dtype=dtype, seed=2)
    check_product(linear(x, w, bias), x, w, bias)
    if inputs % 32:
        assert not ops.is_faster(x)
    else:
        check_product(ops.linear(x, w, bias), x, w, bias)


def test_pairs_are_sorted_as_the_reference_sorts_them(monkeypatch):
    local = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(0))
    ways = []
    for _ in range(2):
        order, counts = sort_by_expert(local, 5)
        ways.append((order, counts, inverse(order)))
        monkeypatch.setattr("tpx.ops.cpu.calls._native", lambda: None)
    for mine, theirs in zip(*ways, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(order[ways[0][2]], torch.arange(200))


def test_places_outside_are_refused_and_nothing_is_written(ops):
    with pytest.raises(AssertionError, match="pair 1 is for expert 3 of 2"):
        ops.sort_by_expert(torch.tensor([0, 3]), 2)
    keys, rows = torch.zeros(2, 4, 1, 8), torch.ones(1, 1, 8)
    with pytest.raises(AssertionError, match="token 0 has slot 8 of 8"):
        ops.write_cache(rows, rows, keys, keys, torch.tensor([8]))
    assert not keys.any()
    batch = (torch.tensor([[2]]).int(), torch.tensor([0, 1]).int(), torch.tensor([1]).int())
    with pytest.raises(AssertionError, match="sequence 0 reads freed pages"):
        ops.attention(rows, keys, keys, *batch, None, torch.zeros(1))


def test_what_it_cannot_take_goes_to_the_reference(ops):
    x = torch.ones(2, 3)
    assert native(x, None, x.clone()) is ops
    assert native(x.double()) is None
    assert native(x.bfloat16(), x) is None
    assert native(x.to("meta")) is None
    assert native(x.clone().requires_grad_()) is None
    with torch.no_grad():
        assert native(x.clone().requires_grad_()) is ops


def test_the_models_logits_are_the_references(ops, monkeypatch):
    with tpx.LLM(DEMO, dtype="float32", device="cpu") as llm:
        mine = llm.logits(prompts(4096))
        monkeypatch.setattr("tpx.ops.cpu.calls._native", lambda: None)
        theirs = llm.logits(prompts(4096))
    for a, b in zip(mine, theirs, strict=True):
        assert not torch.equal(a, b)  # else both were computed alike
        assert relative_error(a.numpy(), b.numpy()) <= TOLERANCE


# How it is built.


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A `c++` that notes each call and gives the library that is built already; the file `says`
    makes it fail instead."""
    if build.library() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path / "bin"
    folder.mkdir()
    built = build.cache_folder() / f"native-{build.fingerprint()}.so"
    script = f"""#!/bin/sh
echo "$@" >> {folder}/calls
if [ -e {folder}/says ]; then cat {folder}/says >&2; exit 1; fi
for out; do :; done
cp {built} "$out"
"""
    (folder / "c++").write_text(script)
    (folder / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_ranks_that_start_together_build_once_and_later_ones_never(tmp_path, compiler):
    cache = tmp_path / "a" / "cache"
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(build.open_library, [cache] * 4))
    assert all(hasattr(each, "tpx_grouped_mm") for each in opened)
    assert len((compiler / "calls").read_text().splitlines()) == 1
    names = sorted(path.name for path in cache.iterdir())
    assert names == ["lock", f"native-{build.fingerprint()}.so"]


def warned(monkeypatch, caplog, folder: Path) -> str:
    monkeypatch.setattr(build, "cache_folder", lambda: folder)
    with caplog.at_level(logging.WARNING, logger="tpx"):
        assert build.library.__wrapped__() is None
    [record] = caplog.records
    return record.getMessage()


def test_a_failing_compiler_is_one_line_and_leaves_nothing(tmp_path, compiler, monkeypatch, caplog):
    (compiler / "says").write_text("in file lanes.h\nlanes.h:3: error: no such thing\nmore\n")
    line = warned(monkeypatch, caplog, tmp_path / "cache")
    assert line == (
        "no C++ operations on this CPU, packed experts are unpacked by torch at every step, several"
        f" times slower: `{compiler}/c++` failed: lanes.h:3: error: no such thing"
    )
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_no_compiler_and_no_place_to_build_are_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = warned(monkeypatch, caplog, tmp_path / "cache")
    assert line.endswith("slower: none of `c++`, `g++`, `clang++` is installed")
    caplog.clear()
    (tmp_path / "file").write_text("")
    assert "Not a directory" in warned(monkeypatch, caplog, tmp_path / "file" / "cache")


def test_the_name_follows_the_source_the_flags_and_the_processor(tmp_path, monkeypatch):
    names = {build.fingerprint()}
    changed = tmp_path / "native.cpp"
    changed.write_text("// other")
    for name, value in (
        ("SOURCES", (changed,)),
        ("FLAGS", ("-O0",)),
        ("processor", lambda: "flags : other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            names.add(build.fingerprint())
    assert len(names) == 4
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t: 1\nflags\t: fma avx2\nbogomips\t: 1\n\nflags\t: b\n")
    assert build.processor(info) == " 1 fma avx2"
    assert build.processor(tmp_path / "none") == ""


@pytest.mark.more
def test_without_vector_instructions_the_results_are_within_the_same_bound(tmp_path, monkeypatch):
    if not any(map(shutil.which, build.COMPILERS)) or os.uname().machine != "x86_64":
        pytest.skip("no compiler for x86-64")
    flags = tuple("-march=x86-64" if f == "-march=native" else f for f in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", flags)
    plain = Native(build.open_library(tmp_path))
    test_every_byte_and_scale_is_unpacked_exactly(plain)
    for dtype in (torch.float32, torch.bfloat16):
        test_grouped_rows_are_within_the_stated_bound(plain, dtype, [1, 2, 3, 13], 131, 96)
        test_neither_neighbours_nor_threads_nor_repetition_change_a_bit(plain, dtype)
    library = next(tmp_path.glob("*.so"))
    said = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True)
    assert "ymm" not in said.stdout
