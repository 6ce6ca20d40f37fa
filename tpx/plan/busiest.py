"""How many experts, and how many rows, the busiest rank of an ep group has under uniform routing.

Each token picks K of E experts, all choices alike. Real routing is less even: a floor, not a fact.
"""

from __future__ import annotations

import functools
from math import comb, sqrt
from statistics import NormalDist

SURE = 1e-9  # the chance of an expert without a token below which all have one


@functools.cache
def experts_touched(experts: int, top_k: int, ep: int, tokens: int) -> float:
    """The expected number of experts with a token on the rank of ep that has most of them.

    Exact: the number d of experts that `tokens` tokens touch is a Markov chain (a token that finds
    d touched adds j with chance C(E-d, j) C(d, K-j) / C(E, K)). By symmetry the touched ones are a
    uniform d-subset, so the chance that no rank has more than m of its E/ep is the coefficient of
    x^d in (sum_{j<=m} C(E/ep, j) x^j)^ep over C(E, d); the maximum's mean is a sum over m.
    """
    if tokens == 0:
        return 0.0
    held = experts // ep
    if experts * (1 - top_k / experts) ** tokens < SURE:
        return float(held)
    chances = _touched(experts, top_k, tokens)
    below = [_most(experts, held, ep, m) for m in range(held)]
    return sum(
        chance * (1 - within[d]) for within in below for d, chance in enumerate(chances) if chance
    )


def _touched(experts: int, top_k: int, tokens: int) -> list[float]:
    """The chance of each number of touched experts, after so many tokens."""
    chain = _chain(experts, top_k)
    whole = comb(experts, top_k)
    while len(chain) <= tokens:
        after = [0.0] * (experts + 1)
        for d, chance in enumerate(chain[-1]):
            if chance > 1e-15:
                for j in range(min(top_k, experts - d) + 1):
                    move = comb(experts - d, j) * comb(d, top_k - j) / whole
                    after[d + j] += chance * move
        chain.append(after)
    return chain[tokens]


@functools.cache
def _chain(experts: int, top_k: int) -> list[list[float]]:
    """The chances after 0, 1, ... tokens, as far as anybody asked: `_touched` makes it longer."""
    return [[1.0] + [0.0] * experts]


@functools.cache
def _most(experts: int, held: int, ep: int, most: int) -> list[float]:
    """For each d the chance that d touched experts lie at most `most` on each of ep ranks.

    The power of the polynomial is one of a whole number: its coefficients, all below 2^E, are
    written into E + 1 bits each.
    """
    bits = experts + 1
    factor = sum(comb(held, j) << (bits * j) for j in range(most + 1))
    power, mask = factor**ep, (1 << bits) - 1
    return [((power >> (bits * d)) & mask) / comb(experts, d) for d in range(experts + 1)]


def busiest_rows(tokens: int, top_k: int, experts: int, ep: int) -> float:
    """The expected rows of the rank of ep that has most of the tokens' K rows.

    Rows of a rank are nearly normal, with mean TK/ep and variance TK/ep (1 - 1/ep); the largest of
    ep of them lies at the quantile (ep - 3/8) / (ep + 1/4) (Blom 1958). Never more than a row for
    each expert that it holds and each token.
    """
    mean = tokens * top_k / ep
    if ep == 1 or not tokens:
        return mean
    above = NormalDist().inv_cdf((ep - 0.375) / (ep + 0.25)) * sqrt(mean * (1 - 1 / ep))
    return min(mean + above, float(tokens * min(top_k, experts // ep)))
