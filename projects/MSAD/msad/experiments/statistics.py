"""Means of few runs with what they are worth: spread and 95 % confidence intervals by Student's t distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

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
        """Whether 0 lies outside the confidence interval: of a difference, that it is significant."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Of values that are drawn independently, such as those of one model over seeds."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(mean, None, None, n)
    std = statistics.stdev(values)
    return Estimate(mean, std, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n), n)
