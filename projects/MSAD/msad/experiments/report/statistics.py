"""Means of few runs with what they are worth: spread and 95 % confidence intervals by Student's t distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """Mean of n values, their sample standard deviation, and half the width of the mean's confidence interval.

    ``std`` and ``half`` are None for a single value, which says nothing about either.
    """

    mean: float
    std: float | None
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the confidence interval: of a difference, that it is more than chance."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Of values that are drawn independently, such as those of one model over seeds."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(mean, None, None, n)
    std = statistics.stdev(values)
    return Estimate(mean, std, t_quantile(n - 1) * std / math.sqrt(n), n)


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| < t) = ``confidence`` for Student's distribution of ``freedom`` degrees, e.g. 4.303 for 2."""
    low, high = 0.0, math.pi / 2  # angles: bisection stays in a bounded range however long the tail is
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)), the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
