"""sample: the next tokens, without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .device import available, dependent, launch_options
from .register import fake, operation


@operation(
    "sample",
    "(Tensor logits_BV, Tensor temperature_B, Tensor top_k_B, Tensor top_p_B, Tensor u_B, "
    "bool any_top_k=True, bool any_top_p=True) -> Tensor",
)
def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    u_B: Tensor,
    any_top_k: bool = True,
    any_top_p: bool = True,
) -> Tensor:
    """ids_B int64. See reference.sample; temperature, top-p and u float64, top-k int64 (0: all).

    any_top_k, any_top_p: False promises that no row has one, which saves 8 and 9 of 21 launches.
    Differs from the float64 reference by at most V * 2**-45 of the likeliest token's probability in
    where one token's share of u ends and the next one's begins.
    """
    if not available(logits_BV.device):
        return reference.sample(logits_BV, temperature_B, top_k_B, top_p_B, u_B)
    given = (logits_BV, temperature_B, top_k_B, top_p_B, u_B)
    return launch_sample(*given, any_top_k, any_top_p, 1024 if len(logits_BV) < 8 else 2048)


@fake("sample")
def _(logits_BV, temperature_B, top_k_B, top_p_B, u_B, any_top_k=True, any_top_p=True):
    return logits_BV.new_empty((logits_BV.shape[0],), dtype=torch.int64)


def launch_sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    u_B: Tensor,
    any_top_k: bool,
    any_top_p: bool,
    chunk: int,
) -> Tensor:
    """chunk: ids that a program reads; sums are exact, so it does not change what is drawn."""
    from . import sample_kernels as kernels

    logits_BV = logits_BV.contiguous()
    rows, vocabulary = logits_BV.shape
    chunks = -(-vocabulary // chunk)
    where = {"device": logits_BV.device}
    whole = {"dtype": torch.int64, **where}
    ids_B = torch.empty(rows, **whole)
    if rows == 0:
        return ids_B
    kept, *parts = torch.zeros((257, rows), **whole).split((1, 128, 128))
    peaks = torch.empty((rows, chunks), dtype=torch.float32, **where)
    tops = torch.empty(rows, dtype=torch.float32, **where)
    firsts = torch.empty((rows, chunks), dtype=torch.int32, **where)
    keys, ties = torch.empty((2, 2, rows), **whole)
    masses, equals = torch.empty((2, rows, chunks), **whole)
    lows, aboves = torch.empty((2, 8, rows), **whole)
    options = {"CHUNK": chunk, "DEPENDENT": dependent(logits_BV.device)}
    options.update(launch_options(logits_BV.device, 4))
    count = {"CHUNKS": 1 << (chunks - 1).bit_length(), **options}
    grid = (rows, chunks)
    wanted = (temperature_B, top_k_B, top_p_B)
    kernels.peaks[grid](logits_BV, peaks, firsts, vocabulary, chunks, **options)
    for by_mass in (False, True) if any_top_p else (False,):
        states = (lows, aboves, parts[by_mass], keys, ties, kept)
        for digit in range(8 if by_mass or any_top_k else 0):
            kernels.search[grid](
                logits_BV, *wanted, tops, *states, vocabulary, rows, digit,
                BY_MASS=by_mass, FIRST=digit == 0, **options,
            )  # fmt: skip
        kernels.tally[grid](
            logits_BV, *wanted, peaks, tops, *states, masses, equals, vocabulary, rows, chunks,
            BY_COUNT=any_top_k and not by_mass, BY_MASS=by_mass, **count,
        )  # fmt: skip
    final = int(any_top_p)
    kernels.draw[(rows,)](
        logits_BV, temperature_B, u_B, peaks, firsts, keys[final], ties[final], masses, equals,
        ids_B, vocabulary, chunks, **count,
    )  # fmt: skip
    return ids_B
