"""Whether the fast way of unpacking gives what the plain one does, on the device, at load."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from . import configs, device, reference
from .configs import Way
from .layout import FOLD, packed_nbytes
from .packing import Packed

if device.has_triton():
    from . import launch

log = logging.getLogger(__name__)
EXPERTS, TOP_K = 4, 2
FAR = 2e-2  # from the reference, relative: more than rounding to bfloat16 twice explains
SCALES = (120 + FOLD, 128 + FOLD)  # numbers of a usual size


class Trial(NamedTuple):
    """Of one shape and dtype. safe: what Experts.safe should be. failed: the ways in which the fast
    unpacking differed, each with its launch's tiles."""

    hidden: int
    units: int
    safe: bool
    failed: tuple[Way, ...]


def self_test(
    where: torch.device, hidden: int, units: int, dtype: torch.dtype = torch.bfloat16
) -> Trial:
    """Compares both ways of unpacking, bit for bit, in every tile of the device's table, on a few
    random experts of `hidden` columns and `units` intermediate units, and the fast one with the
    reference. Where they differ, or the fast one does not compile, it logs that and asks for the
    safe one. Waits for the device."""
    runs = device.available(where, dtype)
    if not runs or not device.mode(where, dtype).asm or not units:
        return Trial(hidden, units, not runs, ())
    table = configs.table(device.names(where), hidden)
    held = _random_experts(where, hidden, units, dtype)
    cases = [(int(min(way.upto, configs.DECODE_TOKENS)), way) for way in table.decode]
    cases += [(max(configs.DECODE_TOKENS + 1, 2 * way.gate_up.tokens), way) for way in table.sorted]
    with ThreadPoolExecutor() as pool:  # most of the time is the compiler's
        agree = [*pool.map(lambda case: _agree(*case, held, dtype), cases)]
    failed = tuple(way for (_, way), same in zip(cases, agree) if not same)  # noqa: B905
    for way in failed:
        log.warning("MXFP4 experts are unpacked the slow way: the fast one differs in %s", way)
    return Trial(hidden, units, bool(failed), failed)


def _agree(tokens: int, way: Way, held: launch.Held, dtype: torch.dtype) -> bool:
    where = held.gate_up.codes.device
    x = torch.randn(tokens, held.gate_up.columns, device=where, dtype=dtype)
    ids = torch.arange(tokens * TOP_K, device=where, dtype=torch.int32) % EXPERTS
    chosen = launch.Chosen(ids.view(tokens, TOP_K), None)
    mode = device.mode(where, dtype)
    try:
        fast, plain = (
            launch.experts(x, chosen, held, way, mode._replace(asm=asm)) for asm in (True, False)
        )
    except Exception:  # of the compiler: any kind
        log.exception("the fast unpacking of MXFP4 experts does not compile")
        return False
    wide = (held.gate_up_bias.float(), held.down_bias.float(), *held[4:])
    right = reference.experts(x.float(), chosen.ids, held.gate_up, held.down, *wide)[0]
    far = (fast.float().sum(0) - right).norm() / right.norm()
    return torch.equal(fast, plain) and bool(far < FAR)


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
