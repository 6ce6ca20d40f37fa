"""linear_decode: a linear layer for 1 to 16 rows, with the norm before it and the sum after it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import configs, reference
from .device import available, capability, dependent, launch_options, plain
from .register import fake, operation

SCHEMA = (
    "(Tensor x_TK, Tensor weight_NK, Tensor? bias_N=None, Tensor? residual_TN=None, "
    "Tensor? norm_K=None, float eps=1e-5, ScalarType? out_dtype=None) -> Tensor"
)


@operation("linear_decode", SCHEMA)
def linear_decode(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    norm_K: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y_TN = rms_norm(x) * norm @ weight.T + bias + residual, each part but the product optional.

    Sums in float32 and rounds once, to out_dtype (x's if None). The weight is [N, K], contiguous.
    Each output is added up in one fixed order. Where the table names torch, or has no entry for so
    many rows, torch multiplies (and rounds before it adds the residual).
    """
    terms = (bias_N, residual_TN, norm_K, eps, out_dtype)
    if not available(x_TK.device):
        return reference.linear_decode(x_TK, weight_NK, *terms)
    config = configs.linear(_name(x_TK.device), *weight_NK.shape, x_TK.shape[0], norm_K is not None)
    if config is None or not _fits(config, x_TK.shape[1], capability(x_TK.device)):
        return by_torch(x_TK, weight_NK, *terms)
    return launch(x_TK, weight_NK, *terms, config=config)


@fake("linear_decode")
def _(x_TK, weight_NK, bias_N=None, residual_TN=None, norm_K=None, eps=1e-5, out_dtype=None):
    return x_TK.new_empty((x_TK.shape[0], weight_NK.shape[0]), dtype=out_dtype or x_TK.dtype)


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _fits(config: dict[str, Any], k: int, device: tuple[int, int]) -> bool:
    """gemv holds all of K in registers: at most 128 numbers of weight a thread. skinny wants matrix
    units, which triton does not use before capability 8."""
    if config["kernel"] != "gemv":
        return config["kernel"] == "skinny" and device >= (8, 0)
    tiles = -(-k // config["block_k"])
    return tiles * config["block_k"] * config["block_n"] <= 128 * 32 * config["warps"]


def by_torch(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    residual_TN: Tensor | None,
    norm_K: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The same by torch's own product in x's dtype."""
    if norm_K is not None:
        x = x_TK.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        x_TK = (norm_K * (x * scale)).to(x_TK.dtype)
    y_TN = F.linear(x_TK, weight_NK, bias_N)
    if residual_TN is not None:
        y_TN += residual_TN
    return y_TN.to(out_dtype or y_TN.dtype)


def launch(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    residual_TN: Tensor | None,
    norm_K: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    config: dict[str, Any],
) -> Tensor:
    """The kernels, with `config` from a table: see configs.linear."""
    assert weight_NK.is_contiguous()
    assert x_TK.shape[1] == weight_NK.shape[1], f"{x_TK.shape} {weight_NK.shape}"
    x_TK = x_TK.contiguous()
    shape = (x_TK.shape[0], weight_NK.shape[0])
    out_TN = torch.empty(shape, dtype=out_dtype or x_TK.dtype, device=x_TK.device)
    if out_TN.numel() == 0:
        return out_TN
    if residual_TN is not None:
        residual_TN = residual_TN.contiguous()
    if config["kernel"] == "gemv":
        _gemv(x_TK, weight_NK, bias_N, residual_TN, norm_K, eps, out_TN, config)
        return out_TN
    if norm_K is not None:
        x_TK = _norm(x_TK, norm_K, eps)
    _skinny(x_TK, weight_NK, bias_N, residual_TN, out_TN, config)
    return out_TN


def _gemv(x, weight, bias, residual, norm, eps, out, config) -> None:
    from .linear_kernels import gemv

    (rows, k), n = x.shape, weight.shape[0]
    gemv[(-(-n // config["block_n"]),)](
        x, norm, weight, bias, residual, out, n, k, eps,
        ROWS=rows, BLOCK_N=config["block_n"], BLOCK_K=config["block_k"],
        TILES=-(-k // config["block_k"]),
        HAS_NORM=norm is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, DEPENDENT=dependent(x.device),
        **launch_options(x.device, config["warps"]),
    )  # fmt: skip


def _norm(x, norm, eps) -> Tensor:
    from .linear_kernels import rms_norm

    out, k = torch.empty_like(x), x.shape[1]
    rms_norm[(x.shape[0],)](
        x, norm, out, k, eps, BLOCK_K=1024, TILES=-(-k // 1024), DEPENDENT=dependent(x.device),
        **launch_options(x.device, 4),
    )  # fmt: skip
    return out


def _skinny(x, weight, bias, residual, out, config) -> None:
    from .linear_kernels import reduce, skinny

    (rows, k), n, splits = x.shape, weight.shape[0], config["splits"]
    steps = -(-k // (config["block_k"] * splits))
    flags = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    into = out
    if splits > 1:
        into = torch.empty((splits, rows, n), dtype=torch.float32, device=x.device)
    skinny[(-(-n // config["block_n"]), splits)](
        x, weight, bias, residual, into, rows, n, k,
        BLOCK_T=8 if rows <= 8 else -(-rows // 16) * 16, BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"], STEPS=steps, SPLITS=splits, PLAIN=plain(x.device),
        DEPENDENT=dependent(x.device), **flags,
        **launch_options(x.device, config["warps"], config["stages"]),
    )  # fmt: skip
    if splits > 1:
        reduce[(-(-rows * n // 512),)](
            into, bias, residual, out, rows * n, n, SPLITS=splits, BLOCK=512,
            DEPENDENT=dependent(x.device), **flags, **launch_options(x.device, 4),
        )  # fmt: skip
