"""The statistics against brute force."""

import math
from statistics import median

import numpy as np
import pytest

from bench.stats import P99_CALLS, Ratio, bootstrap_median, drift, paired_ratio, spread


def order_statistic(values, share):
    """Linear interpolation between the order statistics, written out."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (place - below) * (ranked[above] - ranked[below])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 200, 333])
def test_spread_is_the_order_statistics(count):
    values = np.random.default_rng(count).lognormal(size=count).tolist()
    got = spread(values)
    assert got.median == pytest.approx(median(values))
    assert got.p10 == pytest.approx(order_statistic(values, 0.1))
    assert got.p90 == pytest.approx(order_statistic(values, 0.9))
    if count >= P99_CALLS:
        assert got.p99 == pytest.approx(order_statistic(values, 0.99))


@pytest.mark.parametrize("count, has_p99", [(P99_CALLS - 1, False), (P99_CALLS, True)])
def test_p99_needs_200_calls(count, has_p99):
    assert (spread(range(count)).p99 is not None) is has_p99


def test_spread_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        spread([])


def exact_bootstrap(values, level):
    """Quantile of the median over all resamples of an odd number of distinct values, from the binomial distribution.

    The median is at most the k-th smallest value when at least half of the draws are.
    """
    n = len(values)
    for k, value in enumerate(sorted(values), 1):
        p = k / n
        at_most = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range((n + 1) // 2, n + 1))
        if at_most >= level:
            return value
    raise AssertionError("a distribution function ends at 1")


@pytest.mark.parametrize("count", [3, 5, 9, 15, 31])
def test_interval_is_that_of_all_resamples(count):
    values = np.random.default_rng(count).normal(size=count)
    noise = 0.01  # four standard deviations of a tail share over the resamples, and a little
    for got, level in zip(bootstrap_median(values), (0.025, 0.975), strict=True):
        assert exact_bootstrap(values, level - noise) <= got <= exact_bootstrap(values, level + noise)


def test_pairing_cancels_the_drift_of_the_machine():
    drift = np.linspace(1, 5, 11)
    ratio = paired_ratio((3 * drift).tolist(), (2 * drift).tolist())
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_ratio_is_the_median_of_the_rounds_ratios():
    ratio = paired_ratio([1.0, 8.0, 3.0], [2.0, 2.0, 2.0])
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 0.5, 4.0)


@pytest.mark.parametrize("ours, theirs", [([1.0], [1.0, 2.0]), ([], [])])
def test_unpaired_rounds_are_an_error(ours, theirs):
    with pytest.raises(ValueError, match="paired rounds"):
        paired_ratio(ours, theirs)


@pytest.mark.parametrize(
    "low, high, verdict",
    [(1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (0.99, 1.2, "no difference"), (1.0, 1.2, "no difference")],
)
def test_the_verdict_is_that_of_the_whole_interval(low, high, verdict):
    assert Ratio(1.0, low, high).verdict == verdict


def test_drift_is_from_p10_to_p90():
    assert drift([1.0] * 50) == 0.0
    assert drift(range(100, 201)) == pytest.approx(190 / 110 - 1)
