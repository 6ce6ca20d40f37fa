"""Measured seconds over bytes: interpolated inside, alpha-beta outside, never falling.

Knows no collective and no device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log, sqrt


@dataclass(frozen=True, slots=True)
class Curve:
    """nbytes ascend. times: lowered where more bytes were faster. alpha (seconds) and beta
    (seconds a byte): the straight line of least relative error. residual: root mean square of the
    relative errors with which each inner point is told by its neighbours."""

    nbytes: tuple[int, ...]
    times: tuple[float, ...]
    alpha: float
    beta: float
    residual: float

    @classmethod
    def of(cls, nbytes: Sequence[int], seconds: Sequence[float]) -> Curve:
        """Raises ValueError where these are not two equal rows of numbers above 0."""
        if len(nbytes) != len(seconds) or not nbytes or min(*nbytes, *seconds) <= 0:
            raise ValueError("no curve")
        pairs = sorted(zip(map(int, nbytes), map(float, seconds), strict=True))
        sizes = tuple(size for size, _ in pairs)
        if len(set(sizes)) < len(sizes):
            raise ValueError("a size twice")
        # Noise only ever adds: what a larger message took, a smaller one takes at most.
        times = tuple(accumulate((time for _, time in reversed(pairs)), min))[::-1]
        return cls(sizes, times, *_fit(sizes, times), _residual(sizes, times))

    def seconds(self, nbytes: float) -> float:
        """Measured points exactly; between two a straight line of logarithms; beyond them the line
        alpha + beta n, scaled to meet the last point."""
        if nbytes < self.nbytes[0]:
            return self._beyond(0, nbytes)
        if nbytes > self.nbytes[-1]:
            return self._beyond(-1, nbytes)
        right = bisect_left(self.nbytes, nbytes)
        if self.nbytes[right] == nbytes:
            return self.times[right]
        return _between(self.nbytes, self.times, right - 1, right, nbytes)

    def _beyond(self, end: int, nbytes: float) -> float:
        line = self.alpha + self.beta * self.nbytes[end]
        return self.times[end] * (self.alpha + self.beta * nbytes) / line


def _between(
    sizes: Sequence[int], times: Sequence[float], left: int, right: int, nbytes: float
) -> float:
    share = log(nbytes / sizes[left]) / log(sizes[right] / sizes[left])
    return exp((1 - share) * log(times[left]) + share * log(times[right]))


def _fit(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """alpha, beta >= 0 that minimise the sum of ((alpha + beta n) / t - 1)^2."""
    rows = [(1 / t, n / t) for n, t in zip(sizes, times, strict=True)]
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(r[0] for r in rows), sum(r[1] for r in rows)
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        alpha, beta = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if alpha >= 0 and beta >= 0:
            return alpha, beta
    only_alpha, only_beta = (a / aa, 0.0), (0.0, b / bb)
    return min(only_alpha, only_beta, key=lambda line: _error(rows, *line))


def _error(rows: Sequence[tuple[float, float]], alpha: float, beta: float) -> float:
    return sum((alpha * x + beta * y - 1) ** 2 for x, y in rows)


def _residual(sizes: Sequence[int], times: Sequence[float]) -> float:
    inner = range(1, len(sizes) - 1)
    errors = [_between(sizes, times, i - 1, i + 1, sizes[i]) / times[i] - 1 for i in inner]
    return sqrt(sum(e * e for e in errors) / len(errors)) if errors else 1.0
