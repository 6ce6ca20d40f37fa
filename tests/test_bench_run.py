"""`tpx bench latency|throughput|load` on ranks, and the floor of a model that is loaded."""

from __future__ import annotations

import json

import pytest
from launching import ROOT, environment, tpx
from test_plan_html import Page

DEMO = str(ROOT / "examples" / "models" / "tpx-demo")


def found_by(tmp_path, *words) -> dict:
    words = ("bench", words[0], "--model", DEMO, "--device", "cpu", "--json", *words[1:])
    done = tpx(*words, cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SHORT = ("--input-len", 4, "--output-len", 3, "--rounds", 1)


@pytest.mark.more
def test_latency_on_two_ranks_with_and_without_kernels(tmp_path):
    words = ("--nproc", 2, "--use-kernels", "both", "--batch", "1,2")
    found = found_by(tmp_path, "latency", *words, *SHORT, "--html", tmp_path / "page.html")
    ways = ["tpx, kernels on", "tpx, kernels off"]
    rows = found["rows"]
    assert [(row["batch"], row["way"]) for row in rows] == [
        (n, way) for n in (1, 2) for way in ways
    ]
    for row in rows:
        assert 0 < row["floor"] < row["seconds"]
        assert row["share"] == pytest.approx(row["floor"] / row["token"])
        assert row["tokens_per_second"] == pytest.approx(3 * row["batch"] / row["seconds"])
    assert found["machine"]["ranks"] == 2
    assert json.loads(Page((tmp_path / "page.html").read_text()).json) == found


@pytest.mark.more
def test_in_float32_a_peer_writes_the_same_tokens(tmp_path):
    words = ("--peer", "transformers", "--batch", "2", "--dtype", "float32")
    found = found_by(tmp_path, "latency", *words, *SHORT)
    assert [row["way"] for row in found["rows"]] == ["tpx", "transformers"]
    told = {"batch": 2, "sequences": 2, "same": 2, "first_difference": None}
    assert found["same_tokens"] == [told]
    assert found["peer"]["threads"] == 1
    assert found["peer"]["chosen"].keys() == {"2"}


@pytest.mark.parametrize(
    "rate",
    [
        pytest.param("inf", marks=pytest.mark.more),
        pytest.param("50", marks=pytest.mark.soak),
    ],
)
def test_throughput_on_two_ranks(tmp_path, rate):
    words = ("--nproc", 2, "--requests", 5, "--batch", 2, "--rate", rate, "--prefix-len", 2)
    found = found_by(tmp_path, "throughput", *words, "--prefix-cache", "both", *SHORT)
    assert [row["way"] for row in found["rows"]] == [
        "tpx, prefix cache on",
        "tpx, prefix cache off",
    ]
    for row in found["rows"]:
        assert row["output_per_second"] == pytest.approx(15 / row["seconds"])
        assert row["total_per_second"] == pytest.approx(35 / row["seconds"])
        for times in (row["first_token"], row["token"]):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"]


@pytest.mark.more
def test_a_load_on_two_ranks(tmp_path):
    found = found_by(tmp_path, "load", "--nproc", 2, "--tp-plan", "tp2", "--rounds", 1)
    [row] = found["rows"]
    assert row["seconds"] == pytest.approx(sum(row["parts"].values()))
    assert min(row["parts"].values()) > 0
    assert row["bytes_held"] <= row["bytes_read"] < row["host_peak"]
    assert found["model"]["plan"] == "tp2"


@pytest.mark.more
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_floor_counts_the_weights_that_the_model_holds(dtype):
    """With so many sequences that every expert is touched."""
    import torch

    import tpx as package
    from tpx.bench.floor import Floor, largest_cache
    from tpx.plan.memory import kv_bytes

    with package.LLM(DEMO, device="cpu", dtype=dtype) as llm:
        floor = Floor(llm)
        held = {
            name: p.nbytes for name, p in llm.model.named_parameters() if "embed_tokens" not in name
        }
        cache = kv_bytes(llm.spec, 4, 64, 1, dtype) * 400
        assert largest_cache() > 0
        assert floor.step_bytes(400, 64) == pytest.approx(sum(held.values()) + cache, rel=0.01)
        one = floor.step_bytes(1, 64)
        experts = sum(nbytes for name, nbytes in held.items() if ".experts." in name)
        dense = sum(held.values()) - experts
        assert one == pytest.approx(dense + experts / 4 + cache / 400, rel=0.01)
        assert floor.step_seconds(1, 64) == one / floor.rate
        assert llm.dtype == getattr(torch, dtype)
