"""Experts: this rank's piece of every expert that it holds, under the checkpoint's names.

Knows rows sorted by expert; not routing, tokens or other ranks. Its output is a partial sum where
the intermediate dimension is cut (etp), whose bias one rank of the etp group adds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..families.spec import ModelSpec
from ..mxfp4 import BLOCK, Mxfp4
from ..ops.grouped_mm import grouped_mm
from ..ops.swiglu import swiglu


class Experts(nn.Module):
    """e experts, F units of the intermediate dimension (F may be 0), H hidden. Frozen.

    MXFP4: gate_up_proj_blocks [e, 2F, H/32, 16], down_proj_blocks [e, H, F/32, 16], and _scales
    without the last dimension, uint8. Plain: gate_up_proj [e, H, 2F], down_proj [e, F, H]. Both:
    gate_up_proj_bias [e, 2F], down_proj_bias [e, H], which `add_bias` alone adds. Gate and up are
    interleaved.
    """

    gate_up_proj_bias: Tensor
    down_proj_bias: Tensor

    def __init__(self, spec: ModelSpec, e: int, f: int, dtype: torch.dtype, *, add_bias: bool):
        super().__init__()
        h = spec.hidden_size
        self.alpha, self.limit, self.add_bias = spec.swiglu_alpha, spec.swiglu_limit, add_bias
        self.packed = spec.experts == "mxfp4"
        if self.packed:
            self._hold("gate_up_proj_blocks", (e, 2 * f, h // BLOCK, BLOCK // 2), torch.uint8)
            self._hold("gate_up_proj_scales", (e, 2 * f, h // BLOCK), torch.uint8)
            self._hold("down_proj_blocks", (e, h, f // BLOCK, BLOCK // 2), torch.uint8)
            self._hold("down_proj_scales", (e, h, f // BLOCK), torch.uint8)
        else:
            self._hold("gate_up_proj", (e, h, 2 * f), dtype)
            self._hold("down_proj", (e, f, h), dtype)
        self._hold("gate_up_proj_bias", (e, 2 * f), dtype)
        self._hold("down_proj_bias", (e, h), dtype)

    def forward(self, x_RD: Tensor, counts_e: Tensor) -> Tensor:
        """y_RD of rows sorted by expert, counts_e of each; rows beyond their sum give zeros."""
        bias = self.down_proj_bias if self.add_bias else None
        h_RG = grouped_mm(x_RD, counts_e, self._weight("gate_up_proj"), self.gate_up_proj_bias)
        h_RF = swiglu(h_RG, self.alpha, self.limit)
        return grouped_mm(h_RF, counts_e, self._weight("down_proj"), bias)

    def prepare(self) -> None:
        """Puts the weights into the order that a kernel reads, in the same memory, once after
        loading; its exact inverse is what saving would call. The reference reads the checkpoint's
        own order, so nothing moves."""

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), False))

    def _weight(self, name: str) -> Mxfp4 | Tensor:
        if self.packed:
            return Mxfp4(getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales"))
        weight: Tensor = getattr(self, name)
        return weight
