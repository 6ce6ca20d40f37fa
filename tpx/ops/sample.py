"""Draws next tokens: greedy, temperature, top-k, top-p.

A draw is a function of the logits and of u, and u of the request's seed and the token's position
alone: neither world, plan, batch nor order changes it. Knows no request.
"""

from __future__ import annotations

import hashlib
import struct

import torch

from .kernel import Kernel

# B: rows drawn, V: vocabulary.


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1), of 53 bits, that belongs to `position` of a sequence with `seed`."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    u_B: torch.Tensor,
    any_top_k: bool = True,
    any_top_p: bool = True,
    kernel: Kernel = None,
) -> torch.Tensor:
    """-> ids_B, int64. temperature 0: the likeliest token, of equal ones the lowest id.

    Otherwise temperature, then top-k, then top-p (float64 temperature_B, top_p_B, u_B; int64
    top_k_B, 0 keeps all), and the inverse of the cumulative distribution at u. any_top_k,
    any_top_p: whether a row may have one.
    """
    if kernel is not None:
        drawn_B: torch.Tensor = kernel.sample(
            logits_BV, temperature_B, top_k_B, top_p_B, u_B, any_top_k, any_top_p
        )
        return drawn_B
    ids_B = logits_BV.argmax(-1)
    (drawn,) = torch.nonzero(temperature_B > 0, as_tuple=True)
    if len(drawn):
        p = probabilities(logits_BV[drawn], temperature_B[drawn], top_k_B[drawn], top_p_B[drawn])
        ids_B[drawn] = inverse_cdf(p, u_B[drawn])
    return ids_B


def probabilities(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
) -> torch.Tensor:
    """What is drawn from: float64 [B, V], 0 where top-k or top-p drop a token; rows sum to 1.

    top-p keeps the likeliest tokens up to the one that reaches it. Of equally likely tokens the
    lower id comes first.
    """
    scores_BV = logits_BV.double()
    scores_BV = (
        scores_BV - scores_BV.max(-1, keepdim=True).values
    )  # so that a tiny temperature is 0
    p_BV = (scores_BV / temperature_B[:, None]).softmax(-1)
    if not bool((top_k_B > 0).any() or (top_p_B < 1).any()):
        return p_BV
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(p_BV.shape[1], device=p_BV.device)
    dropped_BV = (top_k_B[:, None] > 0) & (rank_V >= top_k_B[:, None])
    sorted_BV = sorted_BV.masked_fill(dropped_BV, 0)
    sorted_BV = sorted_BV / sorted_BV.sum(-1, keepdim=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    reached_BV = (before_BV >= top_p_B[:, None]) & (top_p_B[:, None] < 1)
    sorted_BV = sorted_BV.masked_fill(reached_BV, 0)
    kept_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, sorted_BV)
    return kept_BV / kept_BV.sum(-1, keepdim=True)


def inverse_cdf(p_BV: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
    """The first id, in order of ids, whose cumulative probability passes u; -> int64 [B].

    The order of ids, not of probabilities: a rounding error in the logits then moves a boundary by
    as little, and cannot swap two tokens that are almost equally likely.
    """
    cdf_BV = p_BV.cumsum(-1)
    total_B = cdf_BV[:, -1]
    below_B = torch.nextafter(total_B, torch.zeros_like(total_B))
    return torch.searchsorted(cdf_BV, torch.minimum(u_B * total_B, below_B)[:, None], right=True)[
        :, 0
    ]
