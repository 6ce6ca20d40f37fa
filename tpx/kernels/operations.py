"""The operations that have a kernel, and the packages of kernels that tpx ships."""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """folder: in kernels/. repo, version: of its build on the Hugging Face Hub."""

    name: str
    folder: str
    repo: str
    version: str


class Operation(NamedTuple):
    """package: ours. functions: what a kernel must offer; any one of these sets will do."""

    package: Package
    functions: tuple[tuple[str, ...], ...]


PUBLISHER = "tpx"
MOE = Package("tpx_moe", "tpx-moe", f"{PUBLISHER}/tpx-moe", "1")
ATTENTION = Package("tpx_attention", "tpx-attention", f"{PUBLISHER}/tpx-attention", "1")
PACKAGES = (MOE, ATTENTION)
OPERATIONS = {
    "attention": Operation(
        ATTENTION,
        (
            ("rope_write", "rope_write_attention", "decode_attention", "prefill_attention"),
            ("flash_attn_varlen_func",),  # FlashAttention's own interface
        ),
    ),
    "linear": Operation(ATTENTION, (("linear_decode",),)),
    "sample": Operation(ATTENTION, (("sample",),)),
    "route": Operation(MOE, (("route", "Router"),)),
    "experts": Operation(
        MOE,
        (
            ("Experts", "Router", "pack", "unpack", "packed_nbytes", "self_test", "experts",
             "route_experts", "reduce", "reduce_residual_norm"),
        ),
    ),
    "norm": Operation(MOE, (("residual_norm",),)),
}  # fmt: skip
