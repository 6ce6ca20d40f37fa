"""The self test under triton's interpreter: the launches of a model's shapes, on few experts."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tpx_moe import Trial, self_test
from tpx_moe.configs import Table, Tile, Way
from tpx_moe.device import Mode

selftest = pytest.importorskip("tpx_moe.selftest")
launch = pytest.importorskip("tpx_moe.launch", reason="needs triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # sigmoid of -100 is 0
]

CPU = torch.device("cpu")
TILE = Tile(64, 4, 1, 1, 1, 1, parted=False, halvings=0)
ONE = Way(False, 1, False, TILE, TILE._replace(split=2))
SORTED = Way(True, 1e6, False, TILE, TILE)
ASKED = (64, 32, torch.float32)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """A CPU that is taken for a device: the experts' launches, and what their results are
    multiplied by."""
    torch.manual_seed(3)
    given, factors = list[tuple[launch.Held, int, int | None]](), dict[Way, float]()
    real = launch.experts

    def experts(x, chosen, held, way, mode, logits):
        given.append((held, chosen.ids.shape[1], None if logits is None else logits.shape[1]))
        y = real(x, chosen, held, way, Mode(False, False), logits)
        return y * factors.get(way, 1.0)

    monkeypatch.setattr(launch, "experts", experts)
    monkeypatch.setattr(selftest.device, "available", lambda where, dtype: True)
    monkeypatch.setattr(selftest.device, "mode", lambda where, dtype: Mode(True, False))
    monkeypatch.setattr(selftest.configs, "table", lambda *_: Table((ONE,), (SORTED,)))
    # the interpreter is no friend of threads
    monkeypatch.setattr(selftest, "ThreadPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    return given, factors


@pytest.mark.parametrize(("top_k", "experts", "held"), [
    (4, 8, 5), (4, 8, 2), (6, 8, 8), (1, 1, 1),
])  # fmt: skip
def test_it_launches_what_the_model_launches(launched, top_k, experts, held):
    trial = self_test(CPU, *ASKED, top_k, experts, held)
    assert trial == Trial(64, 32, False, ())
    given, _ = launched
    assert [(len(one.gate_up.codes), k, chosen) for one, k, chosen in given] == [
        (held, top_k, experts), (held, top_k, None),
    ]  # fmt: skip
    assert all((one.slots is None) == (held == experts) for one, _, _ in given)


@pytest.mark.parametrize("wrong", [ONE, SORTED])
def test_a_way_that_is_wrong_is_named(launched, caplog, wrong):
    launched[1][wrong] = 1.1
    with caplog.at_level(logging.WARNING, "tpx_moe"):
        assert self_test(CPU, *ASKED, 4, 8, 5) == Trial(64, 32, True, (wrong,))
    assert [record.message for record in caplog.records] == [
        f"MXFP4 experts are unpacked the slow way: the fast one is wrong in {wrong}"
    ]


def test_one_that_only_launches_judges_nothing(launched):
    launched[1][ONE] = 1.1
    assert self_test(CPU, *ASKED, 4, 8, 5, judge=False) == Trial(64, 32, False, ())
    assert len(launched[0]) == 2


def test_where_no_expert_is_held_nothing_is_launched(launched):
    assert self_test(CPU, *ASKED, 4, 8, 0) == Trial(64, 32, False, ())
    assert not launched[0]
