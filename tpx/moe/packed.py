"""Experts in a kernel's layout, and the calls of that kernel. Knows tpx_moe's functions alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..mxfp4 import BLOCK
from ..ops.kernel import Kernel
from ..ops.route import Router, Routing
from ..read import Memory

KNOWN: dict[tuple[Any, ...], bool] = {}  # see unpacks_safely
MATRICES = {"gate_up_proj": True, "down_proj": False}  # whether rows are pairs of gate and up


class PackedExperts:
    """matrices: gate_up and down, as `pack` gives them. constants: alpha and limit of SwiGLU, and
    slot_E, see Placement."""

    def __init__(
        self,
        kernel: Kernel,
        matrices: Sequence[Any],
        biases: tuple[Tensor, Tensor | None],
        constants: tuple[float, float, Tensor | None],
    ):
        self._kernel = kernel
        sizes = matrices[0].columns, matrices[1].columns
        safe = unpacks_safely(kernel, biases[0].device, *sizes, biases[0].dtype)
        self.held = kernel.Experts(*matrices, *biases, *constants, safe)

    def routes(self, kernel: Kernel) -> bool:
        """Whether `routed` is that kernel's routing too."""
        return kernel is self._kernel

    def routed(self, x_TD: Tensor, router: Router) -> tuple[Tensor, Routing]:
        """What `parts` gives for the experts that the router chooses for rms_norm(x), and these."""
        norm_D, eps, w_ED, b_E, top_k = router
        of = self._kernel.Router(w_ED, b_E, top_k, norm_D, eps)
        y_SND, *chosen = self._kernel.route_experts(x_TD, of, self.held)
        return y_SND, Routing(*chosen)

    def parts(self, x_PD: Tensor, routing: Routing) -> Tensor:
        """y_SND: of each pair of a token and an expert that is here, in S parts."""
        y_SND: Tensor = self._kernel.experts(x_PD, routing.expert_ids_TK, self.held)
        return y_SND

    def sum(self, y_SND: Tensor, routing: Routing) -> Tensor:
        """sum_PD over the experts that are here, weighted."""
        sum_PD: Tensor = self._kernel.reduce(y_SND, *routing, self.held.slot_E)
        return sum_PD

    def add(
        self, y_SND: Tensor, routing: Routing, residual_PD: Tensor, norm_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(residual + that sum, rms_norm of it), in one launch."""
        terms = residual_PD, norm_D, eps, self.held.slot_E
        total, normed = self._kernel.reduce_residual_norm(y_SND, *routing, *terms)
        return total, normed


def packed_nbytes(kernel: Kernel, shape: Sequence[int]) -> tuple[int, int]:
    """Bytes of the codes and of the scales of blocks [e, rows, columns / 32, 16]."""
    e, rows, groups, _ = shape
    codes, scales = kernel.packed_nbytes(rows, groups * BLOCK)
    return e * codes, e * scales


def pack(kernel: Kernel, memory: Memory, name: str, blocks: Tensor, scales: Tensor) -> Any:
    """The matrix in the kernel's layout, in the slots of its blocks and scales."""
    e, sizes = blocks.shape[0], packed_nbytes(kernel, blocks.shape)
    slots = [memory.slot(f"{name}_{part}") for part in ("blocks", "scales")]
    places = [slot[:size].view(e, size // e) for slot, size in zip(slots, sizes, strict=True)]
    codes = memory.scratch[: sizes[0]].view_as(places[0])
    packed = kernel.pack(blocks, scales, MATRICES[name], (codes, torch.empty_like(places[1])))
    places[0].copy_(packed.codes)
    places[1].copy_(packed.scales)
    return packed._replace(codes=places[0], scales=places[1])


def unpacks_safely(kernel: Kernel, *trial: Any) -> bool:
    """Whether the kernel is to unpack elementwise. trial: device, hidden, units and dtype, for
    which it tries its fast way, once a process."""
    if (kernel, *trial) not in KNOWN:
        KNOWN[kernel, *trial] = kernel.self_test(*trial).safe
    return KNOWN[kernel, *trial]
