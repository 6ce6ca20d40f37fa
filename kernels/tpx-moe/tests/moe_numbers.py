"""Random layers for the tests, and how far two tensors are apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tpx_moe import Experts, Packed, Router, pack


class Layer(NamedTuple):
    """x [T, D], where it goes, and the experts here."""

    x: Tensor
    router: Router
    held: Experts


def checkpoint(
    experts: int, rows: int, columns: int, device: str = "cpu", scales: tuple[int, int] = (118, 126)
) -> tuple[Tensor, Tensor]:
    """Random blocks, and scale bytes in a range, both ends of it included, as a checkpoint has
    them."""
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    bytes_ = torch.randint(scales[0], scales[1] + 1, blocks.shape[:3]).to(torch.uint8)
    ends = torch.tensor(scales, dtype=torch.uint8)[: bytes_.numel()]
    bytes_.view(-1)[: len(ends)] = ends
    return blocks.to(device), bytes_.to(device)


def matrix(
    experts: int,
    rows: int,
    columns: int,
    pairs: bool,
    device: str = "cpu",
    scales: tuple[int, int] = (118, 126),
) -> Packed:
    return pack(*checkpoint(experts, rows, columns, device, scales), pairs)


def layer(
    tokens: int,
    hidden: int,
    units: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    slots: Tensor | None = None,
    down_bias: bool = True,
    scales: tuple[int, int] = (118, 126),
) -> Layer:
    """`slots`: of all experts; only those that are here get weights."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(device, dtype)

    held = experts if slots is None else int((slots >= 0).sum())
    norm = draw(hidden, scale=0.1) + 1
    router = Router(draw(experts, hidden, scale=0.2), draw(experts), top_k, norm)
    up = matrix(held, 2 * units, hidden, True, device, scales)
    down = matrix(held, hidden, units, False, device, scales)
    biases = draw(held, 2 * units), draw(held, hidden) if down_bias else None
    slots = None if slots is None else slots.to(device, torch.int32)
    return Layer(draw(tokens, hidden), router, Experts(up, down, *biases, slot_E=slots))


def distance(found: Tensor, right: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite where `found` has something not finite, 0 where
    there is nothing to compare."""
    assert found.shape == right.shape, f"{tuple(found.shape)=} {tuple(right.shape)=}"
    if not right.numel():
        return 0.0
    found, right = found.double(), right.double()
    if not found.isfinite().all():
        return float("inf")
    return float((found - right).norm() / right.norm())
