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
LEAST = 4  # experts that it makes, or the top_k of a model with more
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
    top_k: int = 2,
    experts: int = LEAST,
    held: int = LEAST,
    judge: bool = True,
) -> Trial:
    """Compares the fast unpacking with the reference, in every tile of the device's table, on a few
    random experts of `hidden` columns and `units` intermediate units, as kernels compile where the
    router chooses top_k of `experts`, of which `held` are here. Where it is far from it, or does
    not compile, it logs that and asks for the safe one. Waits for the device.

    judge: False only launches, and packs, and says nothing of what came out, for one who wants to
    know what is launched at load.
    """
    runs = device.available(where, dtype)
    if not runs or not device.mode(where, dtype).asm or not units or not held:
        return Trial(hidden, units, not runs, ())
    table = configs.table(device.names(where), hidden)
    made = min(held, max(LEAST, top_k))
    some = Some(_random_experts(where, hidden, units, dtype, made), top_k, experts, held)
    cases = [(int(way.upto), way) for way in table.decode]
    cases += [(max(table.few + 1, 2 * way.gate_up.tokens), way) for way in table.sorted]
    if not judge:
        _launch_all(cases, some, dtype)
        return Trial(hidden, units, False, ())
    with ThreadPoolExecutor(initializer=_use, initargs=(where,)) as pool:
        right = [*pool.map(lambda case: _is_right(*case, some, dtype), cases)]
    failed = tuple(way for (_, way), good in zip(cases, right) if not good)  # noqa: B905
    for way in failed:
        log.warning("MXFP4 experts are unpacked the slow way: the fast one is wrong in %s", way)
    return Trial(hidden, units, bool(failed), failed)


class Some(NamedTuple):
    """The first experts of a model, which stand for all that are held here: of these no others are
    chosen."""

    made: launch.Held
    top_k: int
    experts: int
    held: int

    def all(self) -> launch.Held:
        """With as many as the model's. Their memory is the first one's: kernels go by its address
        alone, and read those that are chosen."""
        gate_up, down = (
            Packed(*(part[:1].expand(self.held, -1) for part in one[:2]), *one[2:])
            for one in self.made[:2]
        )
        return self.made._replace(gate_up=gate_up, down=down, slots=self.slots())

    def slots(self) -> Tensor | None:
        if self.held == self.experts:
            return None
        codes = self.made.gate_up.codes
        slot = torch.arange(self.experts, dtype=torch.int32, device=codes.device)
        return slot.masked_fill(slot >= len(codes), -1)


def _launch_all(cases: list[tuple[int, Way]], some: Some, dtype: torch.dtype) -> None:
    for tokens, way in cases:
        _launch(tokens, way, some, dtype)
    for matrix in (some.made.gate_up, some.made.down):
        shape = 1, matrix.rows, matrix.columns // BLOCK
        blocks = matrix.codes.new_zeros(*shape, BLOCK // 2)
        pack(blocks, matrix.scales.new_zeros(shape), matrix.pairs)


def _launch(tokens: int, way: Way, some: Some, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, its experts' ids, and what they give: parts to be added."""
    where, made = some.made.gate_up.codes.device, len(some.made.gate_up.codes)
    x = torch.randn(tokens, some.made.gate_up.columns, device=where, dtype=dtype)
    ids = torch.arange(tokens * some.top_k, device=where, dtype=torch.int32) % made
    chosen = Chosen(ids.view(tokens, some.top_k), x.new_empty(tokens, some.top_k))
    logits = None
    if not way.sorted:
        logits = torch.randn(tokens, some.experts, device=where, dtype=dtype)
        logits[:, made:] -= 1000
    y = launch.experts(x, chosen, some.all(), way, device.mode(where, dtype), logits)
    return x, chosen.ids, y


def _is_right(tokens: int, way: Way, some: Some, dtype: torch.dtype) -> bool:
    try:
        x, ids, fast = _launch(tokens, way, some, dtype)
    except Exception:  # of the compiler: any kind
        log.exception("the fast unpacking of MXFP4 experts does not compile")
        return False
    gate_up, down, *biases, _, alpha, limit = some.made
    wide = (bias.float() for bias in biases)
    right = reference.experts(x.float(), ids, gate_up, down, *wide, some.slots(), alpha, limit)[0]
    here = ids.flatten() < len(gate_up.codes)  # all, unless fewer than top_k are held
    far = (fast.float().sum(0) - right)[here].norm() / right.norm()
    return bool(far < FAR)


def _use(where: torch.device) -> None:
    """A thread begins on the first device, whichever its process has chosen."""
    if where.index is not None:
        torch.cuda.set_device(where)


def _random_experts(
    where: torch.device, hidden: int, units: int, dtype: torch.dtype, count: int
) -> launch.Held:
    def packed(rows: int, columns: int, pairs: bool) -> Packed:
        codes, scales = packed_nbytes(rows, columns)
        return Packed(
            _bytes(0, 256, (count, codes), where),
            _bytes(*SCALES, (count, scales), where),
            rows,
            columns,
            pairs,
            False,
        )

    biases = (torch.randn(count, n, device=where, dtype=dtype) for n in (2 * units, hidden))
    up, down = packed(2 * units, hidden, True), packed(hidden, units, False)
    return launch.Held(up, down, *biases, None, 1.702, 7.0)


def _bytes(low: int, high: int, shape: tuple[int, int], where: torch.device) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, device=where)
