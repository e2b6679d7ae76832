"""Statistics of interleaved rounds: percentiles of the calls, and the ratio of two peers with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

P99_CALLS = 200
OUTSIDE = 40  # one in so many beyond either end of an interval
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"


@dataclass(frozen=True)
class Spread:
    """Median and percentiles of a sample, in the sample's unit; p99 is None below `P99_CALLS` values."""

    median: float
    p10: float
    p90: float
    p99: float | None


@dataclass(frozen=True)
class Ratio:
    """A median ratio with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval says of the candidate, which is better above 1."""
        return FASTER if self.low > 1 else SLOWER if self.high < 1 else NO_DIFFERENCE


def spread(values: Sequence[float]) -> Spread:
    """Median, p10, p90 and p99 (linear interpolation between order statistics) of `values`.

    Raises:
        ValueError: `values` is empty.
    """
    if not len(values):
        raise ValueError("no values to summarise")
    median, p10, p90, p99 = (float(q) for q in np.percentile(values, (50, 10, 90, 99)))
    return Spread(median, p10, p90, p99 if len(values) >= P99_CALLS else None)


def drift(values: Sequence[float]) -> float:
    """p90 / p10 - 1 of what should always be the same; raises as `spread`."""
    found = spread(values)
    return found.p90 / found.p10 - 1


def median_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of a 95% interval of the median of what the n values are drawn from, whatever its distribution.

    They are the order statistics x_(k) and x_(n+1-k) with the largest k for which 2 P(Bin(n, 1/2) < k) <= 5% (the sign
    test turned around: Conover, Practical Nonparametric Statistics, 3.2): the range of 6 to 8 values. That of fewer is
    returned, too, and holds the median less often.
    """
    ordered, count = np.sort(values), len(values)
    at_most, k = 1, 0  # of 2**count ways to fall, those with at most k values below the median
    while OUTSIDE * at_most <= 2**count:
        k += 1
        at_most += math.comb(count, k)
    return float(ordered[max(k, 1) - 1]), float(ordered[count - max(k, 1)])


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Median over rounds of numerator / denominator, with its 95% interval.

    Both come from the same rounds in the same order: a slow moment of the machine hits both and cancels.

    Raises:
        ValueError: the lengths differ, or there are no rounds.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise ValueError(f"need paired rounds, got {len(numerators)} and {len(denominators)}")
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    low, high = median_interval(ratios)
    return Ratio(float(np.median(ratios)), low, high)
