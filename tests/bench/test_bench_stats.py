"""The statistics against brute force."""

import math
from statistics import median

import numpy as np
import pytest

from bench.stats import P99_CALLS, Ratio, drift, median_interval, paired_ratio, spread


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


@pytest.mark.parametrize(
    "count, first", [(6, 1), (7, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (100, 40)]
)
def test_the_interval_is_that_of_the_sign_test(count, first):
    """`first`: from printed tables of the sign test at 5%, two-sided."""
    values = np.random.default_rng(count).permutation(np.arange(1.0, count + 1))
    assert median_interval(values) == (first, count + 1 - first)


@pytest.mark.parametrize("count", [6, 7, 10])
def test_the_interval_holds_the_median_as_often_as_it_says(count):
    draws = np.random.default_rng(0).lognormal(size=(20_000, count))
    low, high = np.array([median_interval(row) for row in draws]).T
    assert ((low < 1) & (1 < high)).mean() > 0.95 - 0.003


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_interval_of_few_values_is_their_range(count):
    values = np.random.default_rng(count).normal(size=count)
    assert median_interval(values) == (values.min(), values.max())


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
