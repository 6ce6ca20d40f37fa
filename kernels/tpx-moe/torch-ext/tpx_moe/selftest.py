"""Whether the fast way of unpacking is right on the device, at load.

Only the fast way is launched, and compared with the reference: the plain one would be as much again
to compile. That both give the same bits is what the tests on a GPU show.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from . import configs, device, reference
from .configs import Way
from .layout import BLOCK, FOLD, packed_nbytes
from .packing import Packed, pack

if device.has_triton():
    from . import launch
    from .routing import Chosen

log = logging.getLogger(__name__)
EXPERTS, TOP_K = 4, 2
FAR = 2e-2  # from the reference, relative: more than rounding to bfloat16 twice explains
SCALES = (120 + FOLD, 128 + FOLD)  # numbers of a usual size


class Trial(NamedTuple):
    """Of one shape and dtype. safe: what Experts.safe should be. failed: the ways in which the fast
    unpacking was wrong, each with its launch's tiles."""

    hidden: int
    units: int
    safe: bool
    failed: tuple[Way, ...]


def self_test(
    where: torch.device,
    hidden: int,
    units: int,
    dtype: torch.dtype = torch.bfloat16,
    judge: bool = True,
) -> Trial:
    """Compares the fast unpacking with the reference, in every tile of the device's table, on a few
    random experts of `hidden` columns and `units` intermediate units. Where it is far from it, or
    does not compile, it logs that and asks for the safe one. Waits for the device.

    judge: False only launches, and packs, and says nothing of what came out, for one who wants to
    know what is launched at load.
    """
    runs = device.available(where, dtype)
    if not runs or not device.mode(where, dtype).asm or not units:
        return Trial(hidden, units, not runs, ())
    table = configs.table(device.names(where), hidden)
    held = _random_experts(where, hidden, units, dtype)
    cases = [(int(way.upto), way) for way in table.decode]
    cases += [(max(table.few + 1, 2 * way.gate_up.tokens), way) for way in table.sorted]
    if not judge:
        _launch_all(cases, held, dtype)
        return Trial(hidden, units, False, ())
    with ThreadPoolExecutor(initializer=_use, initargs=(where,)) as pool:
        right = [*pool.map(lambda case: _is_right(*case, held, dtype), cases)]
    failed = tuple(way for (_, way), good in zip(cases, right) if not good)  # noqa: B905
    for way in failed:
        log.warning("MXFP4 experts are unpacked the slow way: the fast one is wrong in %s", way)
    return Trial(hidden, units, bool(failed), failed)


def _launch_all(cases: list[tuple[int, Way]], held: launch.Held, dtype: torch.dtype) -> None:
    for tokens, way in cases:
        _launch(tokens, way, held, dtype)
    for matrix in (held.gate_up, held.down):
        shape = 1, matrix.rows, matrix.columns // BLOCK
        blocks = matrix.codes.new_zeros(*shape, BLOCK // 2)
        pack(blocks, matrix.scales.new_zeros(shape), matrix.pairs)


def _launch(
    tokens: int, way: Way, held: launch.Held, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, its experts' ids, and what they give: parts to be added."""
    where = held.gate_up.codes.device
    x = torch.randn(tokens, held.gate_up.columns, device=where, dtype=dtype)
    ids = torch.arange(tokens * TOP_K, device=where, dtype=torch.int32) % EXPERTS
    chosen, logits = Chosen(ids.view(tokens, TOP_K), x.new_empty(tokens, TOP_K)), None
    if not way.sorted:
        logits = torch.randn(tokens, EXPERTS, device=where, dtype=dtype)
    y = launch.experts(x, chosen, held, way, device.mode(where, dtype), logits)
    return x, chosen.ids, y


def _is_right(tokens: int, way: Way, held: launch.Held, dtype: torch.dtype) -> bool:
    try:
        x, ids, fast = _launch(tokens, way, held, dtype)
    except Exception:  # of the compiler: any kind
        log.exception("the fast unpacking of MXFP4 experts does not compile")
        return False
    wide = (held.gate_up_bias.float(), held.down_bias.float(), *held[4:])
    right = reference.experts(x.float(), ids, held.gate_up, held.down, *wide)[0]
    far = (fast.float().sum(0) - right).norm() / right.norm()
    return bool(far < FAR)


def _use(where: torch.device) -> None:
    """A thread begins on the first device, whichever its process has chosen."""
    if where.index is not None:
        torch.cuda.set_device(where)


def _random_experts(
    where: torch.device, hidden: int, units: int, dtype: torch.dtype
) -> launch.Held:
    def packed(rows: int, columns: int, pairs: bool) -> Packed:
        codes, scales = packed_nbytes(rows, columns)
        return Packed(
            _bytes(0, 256, codes, where),
            _bytes(*SCALES, scales, where),
            rows,
            columns,
            pairs,
            False,
        )

    biases = (torch.randn(EXPERTS, n, device=where, dtype=dtype) for n in (2 * units, hidden))
    up, down = packed(2 * units, hidden, True), packed(hidden, units, False)
    return launch.Held(up, down, *biases, None, 1.702, 7.0)


def _bytes(low: int, high: int, size: int, where: torch.device) -> Tensor:
    return torch.randint(low, high, (EXPERTS, size), dtype=torch.uint8, device=where)
