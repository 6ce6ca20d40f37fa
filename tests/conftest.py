"""What every test needs: one thread, scripts/ on the path, and marks that wait to be asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tpx.ops.cpu.calls import _native

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
torch.set_num_threads(1)

ON_REQUEST = ("more", "soak")


@pytest.fixture(scope="module", params=["native", "reference"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a module's tests with the CPU's own operations, and again with torch's."""
    if request.param == "native":
        if _native() is None:
            pytest.skip("no C++ compiler")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpx.ops.cpu.calls._native", lambda: None)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`more` and `soak` wait until -m or the path names them; `gpu` needs a device."""
    asked = config.getoption("markexpr")
    named = any("::" in str(argument) for argument in config.args)
    waiting = [mark for mark in ON_REQUEST if mark not in asked and not named]
    dropped = [item for item in items if any(item.get_closest_marker(m) for m in waiting)]
    if dropped:
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=dropped)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
