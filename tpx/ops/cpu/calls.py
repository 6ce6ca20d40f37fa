"""native.cpp's operations on tensors. Each has the arguments and the result of its reference."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ...mxfp4 import BLOCK, Mxfp4
from .build import library

FLOATS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int64,)
FEW_ROWS = 8  # of x, up to which torch's own matrix product is slower

_FLAGS = [c_int, c_int]  # bfloat16?, threads
_ARGUMENTS = {
    "tpx_grouped_mm": [*_FLAGS, *[c_void_p] * 6, *[c_int64] * 4],
    "tpx_has_bf16": [],
    "tpx_linear": [*_FLAGS, *[c_void_p] * 4, *[c_int64] * 3],
    "tpx_swiglu": [*_FLAGS, *[c_void_p] * 2, c_int64, c_float, c_float],
    "tpx_rms_norm": [*_FLAGS, *[c_void_p] * 3, c_int64, c_int64, c_float],
    "tpx_rope": [*_FLAGS, *[c_void_p] * 4, *[c_int64] * 3],
    "tpx_route": [c_int, *[c_void_p] * 3, *[c_int64] * 3],
    "tpx_attention": [*_FLAGS, *[c_void_p] * 8, *[c_int64] * 8],
    "tpx_write_cache": [*[c_void_p] * 5, *[c_int64] * 3],
    "tpx_sort_by_expert": [*[c_void_p] * 3, *[c_int64] * 2],
    "tpx_inverse": [*[c_void_p] * 2, c_int64],
}


def native(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Native | None:
    """The operations, if they can be built here and take these tensors: all on the CPU, of one of
    `dtypes`, and none of which needs a gradient. None: the reference runs."""
    if _off:
        return None
    dtype, learns = None, torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if not x.is_cpu or (learns and x.requires_grad) or x.dtype != (dtype or x.dtype):
            return None
        dtype = x.dtype
    return _native() if dtype in dtypes else None


@contextmanager
def references() -> Iterator[None]:
    """Meanwhile torch's references run, in all threads of this process."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()


_off = list[bool]()


@functools.cache
def _native() -> Native | None:
    built = library()
    return None if built is None else Native(built)


class Native:
    """Sums are in float32, in an order that is one row's own: neither the rows beside it nor the
    number of threads change a bit. Results are rounded once to the tensors' dtype."""

    def __init__(self, built: ctypes.CDLL):
        for name, arguments in _ARGUMENTS.items():
            function = getattr(built, name)
            function.argtypes, function.restype = arguments, c_int64
        self._built = built
        bf16 = FEW_ROWS if built.tpx_has_bf16() else sys.maxsize
        self._most_rows = {torch.float32: FEW_ROWS, torch.bfloat16: bf16}

    def grouped_mm(
        self, x_RD: Tensor, counts: list[int], weight: Mxfp4, bias_eN: Tensor | None
    ) -> Tensor:
        blocks, scales = weight.blocks.contiguous(), weight.scales.contiguous()
        experts, outputs, inputs = blocks.shape[0], blocks.shape[1], blocks.shape[2] * BLOCK
        x_RD = x_RD.contiguous()
        assert x_RD.shape[1] == inputs, f"{x_RD.shape=} {blocks.shape=}"
        assert min(counts, default=0) >= 0, f"{counts=}"
        bias_eN = None if bias_eN is None else bias_eN.contiguous()
        out_RN = x_RD.new_empty(x_RD.shape[0], outputs)
        self._built.tpx_grouped_mm(
            *_flags(x_RD),
            x_RD.data_ptr(),
            out_RN.data_ptr(),
            None if bias_eN is None else bias_eN.data_ptr(),
            (c_int64 * experts)(*counts),
            blocks.data_ptr(),
            scales.data_ptr(),
            x_RD.shape[0],
            inputs,
            outputs,
            experts,
        )
        return out_RN

    def is_faster(self, x_TK: Tensor) -> bool:
        """Whether `linear` takes these rows and beats torch's. Measured: for few rows it does, and
        for all where bfloat16 is emulated, by 4 to 5 times."""
        tokens, inputs = x_TK.shape
        return tokens <= self._most_rows[x_TK.dtype] and inputs % BLOCK == 0

    def linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        """K must be a multiple of 32."""
        x_TK, weight_NK = x_TK.contiguous(), weight_NK.contiguous()
        (tokens, inputs), outputs = x_TK.shape, weight_NK.shape[0]
        assert weight_NK.shape[1] == inputs, f"{x_TK.shape=} {weight_NK.shape=}"
        assert inputs % BLOCK == 0, f"{x_TK.shape=}"
        out_TN = x_TK.new_empty(tokens, outputs)
        bias = None if bias_N is None else bias_N.contiguous().data_ptr()
        pointers = x_TK.data_ptr(), out_TN.data_ptr(), bias, weight_NK.data_ptr()
        self._built.tpx_linear(*_flags(x_TK), *pointers, tokens, inputs, outputs)
        return out_TN

    def swiglu(self, x_RG: Tensor, alpha: float, limit: float) -> Tensor:
        x_RG = x_RG.contiguous()
        out_RF = x_RG.new_empty(*x_RG.shape[:-1], x_RG.shape[-1] // 2)
        pointers = x_RG.data_ptr(), out_RF.data_ptr()
        self._built.tpx_swiglu(*_flags(x_RG), *pointers, out_RF.numel(), alpha, limit)
        return out_RF

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        assert weight.shape == (width,), f"{weight.shape=} {x.shape=}"
        pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._built.tpx_rms_norm(*_flags(x), *pointers, x.numel() // max(width, 1), width, eps)
        return out

    def rope(self, x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_THD, cos, sin = x_THD.contiguous(), cos.contiguous(), sin.contiguous()
        tokens, heads, width = x_THD.shape
        assert cos.shape == sin.shape == (tokens, width // 2), f"{cos.shape=} {x_THD.shape=}"
        out = torch.empty_like(x_THD)
        pointers = x_THD.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()
        self._built.tpx_rope(*_flags(x_THD), *pointers, tokens, heads, width // 2)
        return out

    def route(self, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The ids and weights of ops.route.Routing."""
        logits_TE = logits_TE.contiguous()
        tokens, experts = logits_TE.shape
        assert 0 < top_k <= experts, f"{top_k=} {experts=}"
        ids_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.int64)
        weights_TK = logits_TE.new_empty((tokens, top_k))
        pointers = logits_TE.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr()
        flag = logits_TE.dtype == torch.bfloat16
        self._built.tpx_route(flag, *pointers, tokens, experts, top_k)
        return ids_TK, weights_TK

    def attention(
        self,
        q_THD: Tensor,
        k: Tensor,
        v: Tensor,
        tables_BN: Tensor,
        starts_B: Tensor,
        lengths_B: Tensor,
        window: int | None,
        sinks_H: Tensor,
    ) -> Tensor:
        """k, v: of the cache. Every page that a token sees is one of the cache's."""
        assert k.is_contiguous(), f"{k.stride()=}"
        assert v.is_contiguous(), f"{v.stride()=}"
        q_THD, sinks_H, tables_BN = (x.contiguous() for x in (q_THD, sinks_H, tables_BN))
        (_, heads, width), (blocks, page, kv_heads, _) = q_THD.shape, k.shape
        out_THD = torch.empty_like(q_THD)
        tensors = q_THD, k, v, sinks_H, out_THD, tables_BN, starts_B, lengths_B
        sizes = *tables_BN.shape, blocks, page, heads, kv_heads, width, window or 0
        pointers = (x.data_ptr() for x in tensors)
        lost = self._built.tpx_attention(*_flags(q_THD), *pointers, *sizes)
        assert lost == tables_BN.shape[0], f"sequence {lost} reads freed pages: {tables_BN[lost]}"
        return out_THD

    def write_cache(
        self, k_TKD: Tensor, v_TKD: Tensor, keys: Tensor, values: Tensor, slots_T: Tensor
    ) -> None:
        assert keys.is_contiguous(), f"{keys.stride()=}"
        assert values.is_contiguous(), f"{values.stride()=}"
        assert k_TKD.shape == v_TKD.shape == (*slots_T.shape, *keys.shape[2:]), f"{k_TKD.shape=}"
        k_TKD, v_TKD, slots_T = k_TKD.contiguous(), v_TKD.contiguous(), slots_T.contiguous()
        tokens, (blocks, page, heads, width) = slots_T.shape[0], keys.shape
        size = heads * width * keys.element_size()
        pointers = (x.data_ptr() for x in (k_TKD, v_TKD, keys, values, slots_T))
        lost = self._built.tpx_write_cache(*pointers, tokens, size, blocks * page)
        assert lost == tokens, f"token {lost} has slot {slots_T[lost]} of {blocks * page}"

    def sort_by_expert(self, local_N: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        local_N = local_N.contiguous()
        order_N, counts_e = torch.empty_like(local_N), local_N.new_empty(experts)
        pointers = local_N.data_ptr(), order_N.data_ptr(), counts_e.data_ptr()
        pairs = local_N.shape[0]
        lost = self._built.tpx_sort_by_expert(*pointers, pairs, experts)
        assert lost == pairs, f"pair {lost} is for expert {local_N[lost]} of {experts}"
        return order_N, counts_e

    def inverse(self, order_N: Tensor) -> Tensor:
        """order_N must be a permutation."""
        order_N, places_N = order_N.contiguous(), torch.empty_like(order_N)
        self._built.tpx_inverse(order_N.data_ptr(), places_N.data_ptr(), order_N.shape[0])
        return places_N


def _flags(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()
