"""What tune_moe.py tries, chooses and writes; it times on a device alone."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from tpx_moe.configs import Tile, Way, parse

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tune_moe

TILE = Tile(32, 8, 2, 3, 2, 1, False, 0)
WAY = Way(False, 8, True, TILE, TILE)


@pytest.mark.parametrize("tokens", tune_moe.TOKENS)
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_hold_the_tokens_and_can_be_launched(tokens, gated):
    found = [*tune_moe.tiles(tokens, tune_moe.FEW, gated)]
    assert len(set(found)) == len(found) > 1
    for tile in found:
        assert tile.granules % 2 == 0
        assert tile.tokens >> tile.halvings >= (16 if tokens > tune_moe.FEW else 8)
        assert not gated or (tile.split, tile.ahead) == (1, 0)
        assert tokens > tune_moe.FEW or tile.tokens >= tokens


def test_the_cheapest_of_gate_up_then_of_down():
    tried = [TILE._replace(stages=stages) for stages in (2, 4, 5)]
    spent = {(3, 3): 9.0, (2, 3): 8.0, (4, 3): 7.0, (5, 3): math.inf, (4, 2): 7.5, (4, 4): 6.0}

    def cost(way: Way) -> float:
        return spent.get((way.gate_up.stages, way.down.stages), math.inf)

    found = tune_moe.best(WAY, {"gate_up": tried, "down": tried}, cost)
    assert (found.gate_up.stages, found.down.stages) == (4, 4)
    assert tune_moe.best(WAY, {"gate_up": tried[2:], "down": []}, cost) == WAY


def test_a_table_that_is_written_is_one_that_is_read():
    many = Way(True, 0, False, TILE._replace(tokens=64, halvings=2), TILE)
    table = parse(tune_moe.entries({4096: many, 8: WAY, 64: many}))
    assert table.decode == (WAY,)
    assert [way.upto for way in table.sorted] == [8.0, tune_moe.LAST]
    assert table.way(64, tune_moe.TOP_K, tune_moe.EXPERTS) == many._replace(upto=8.0)
    assert table.few == 8
