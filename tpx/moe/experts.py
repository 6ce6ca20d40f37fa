"""Experts: this rank's piece of every expert that it holds, under the checkpoint's names.

Knows tokens that came here and their routing; not who sent them. Its output is a partial sum where
the intermediate dimension is cut (etp), whose bias one rank of the etp group adds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..families.spec import ModelSpec
from ..layers.norm import RMSNorm
from ..mxfp4 import BLOCK, Mxfp4
from ..ops.by_expert import inverse, sort_by_expert
from ..ops.grouped_mm import grouped_mm
from ..ops.kernel import REFERENCE, Kernels
from ..ops.route import Routing
from ..ops.swiglu import swiglu
from ..read import Memory
from .dispatch import Placement, weighted_sum
from .packed import MATRICES, PackedExperts, pack, packed_nbytes


class Experts(nn.Module):
    """e experts, F units of the intermediate dimension (F may be 0), H hidden. Frozen.

    MXFP4: gate_up_proj_blocks [e, 2F, H/32, 16], down_proj_blocks [e, H, F/32, 16], and _scales
    without the last dimension, uint8; packed, the same bytes in a kernel's order. Plain:
    gate_up_proj [e, H, 2F], down_proj [e, F, H]. Both: gate_up_proj_bias [e, 2F], down_proj_bias
    [e, H], which `add_bias` alone adds. Gate and up are interleaved.
    """

    gate_up_proj_bias: Tensor
    down_proj_bias: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        f: int,
        dtype: torch.dtype,
        *,
        add_bias: bool,
        kernels: Kernels = REFERENCE,
    ):
        super().__init__()
        e, h = placement.num_local, spec.hidden_size
        self.alpha, self.limit, self.add_bias = spec.swiglu_alpha, spec.swiglu_limit, add_bias
        self.placement, self.mxfp4 = placement, spec.experts == "mxfp4"
        self.kernel = kernels.get("experts") if self.mxfp4 else None
        self.packed: PackedExperts | None = None
        if self.mxfp4:
            self._hold("gate_up_proj_blocks", (e, 2 * f, h // BLOCK, BLOCK // 2), torch.uint8)
            self._hold("gate_up_proj_scales", (e, 2 * f, h // BLOCK), torch.uint8)
            self._hold("down_proj_blocks", (e, h, f // BLOCK, BLOCK // 2), torch.uint8)
            self._hold("down_proj_scales", (e, h, f // BLOCK), torch.uint8)
        else:
            self._hold("gate_up_proj", (e, h, 2 * f), dtype)
            self._hold("down_proj", (e, f, h), dtype)
        self._hold("gate_up_proj_bias", (e, 2 * f), dtype)
        self._hold("down_proj_bias", (e, h), dtype)

    def forward(self, x_PD: Tensor, routing: Routing) -> Tensor:
        """sum_PD: the weighted sum of each token's experts that are here."""
        if self.packed is not None:
            return self.packed.sum(self.packed.parts(x_PD, routing), routing)
        ids_PK, weights_PK = routing
        bias = self.down_proj_bias if self.add_bias else None
        local_N = self.placement.local_E[ids_PK.flatten()]
        # Pairs of experts elsewhere come last, and grouped_mm gives zeros for their rows.
        order_N, counts_e = sort_by_expert(local_N, self.placement.num_local)
        x_ND = x_PD[order_N // ids_PK.shape[1]]
        h_NG = grouped_mm(x_ND, counts_e, self._weight("gate_up_proj"), self.gate_up_proj_bias)
        h_NF = swiglu(h_NG, self.alpha, self.limit)
        y_ND = grouped_mm(h_NF, counts_e, self._weight("down_proj"), bias)
        return weighted_sum(y_ND, inverse(order_N).view_as(ids_PK), weights_PK)

    def add(
        self, x_PD: Tensor, routing: Routing, residual_PD: Tensor, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """(residual + forward(x, routing), the norm of that), of tokens that need no other rank."""
        if self.packed is not None:
            y_SND = self.packed.parts(x_PD, routing)
            return self.packed.add(y_SND, routing, residual_PD, norm.weight, norm.eps)
        return norm.add(self(x_PD, routing), residual_PD)

    def packed_nbytes(self) -> dict[str, int]:
        """Bytes of each parameter that `pack` packs."""
        if self.kernel is None:
            return {}
        found = dict[str, int]()
        for name in MATRICES:
            blocks, scales = packed_nbytes(self.kernel, getattr(self, f"{name}_blocks").shape)
            found |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        return found

    def pack(self, memory: Memory) -> None:
        """Puts the weights into the order that the kernel reads, in their own slots; the kernel's
        `unpack` is the exact inverse."""
        assert self.kernel is not None
        held = [pack(self.kernel, memory, name, *self._weight(name)) for name in MATRICES]
        for name, matrix in zip(MATRICES, held, strict=True):
            self._put(f"{name}_blocks", matrix.codes)
            self._put(f"{name}_scales", matrix.scales)
        bias = self.down_proj_bias if self.add_bias else None
        biases = self.gate_up_proj_bias, bias
        constants = self.alpha, self.limit, self.placement.slot_E
        self.packed = PackedExperts(self.kernel, held, biases, constants)

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._put(name, torch.empty(shape, dtype=dtype))

    def _put(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, False))

    def _weight(self, name: str) -> Mxfp4 | Tensor:
        if self.mxfp4:
            return Mxfp4(getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales"))
        weight: Tensor = getattr(self, name)
        return weight
