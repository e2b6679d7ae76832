"""The lengths of padded batches, and the parts that sorting makes of them."""

import math

import numpy as np
import pytest

from bench.lengths import BUCKETS, buckets, mean_fill, spread_lengths


@pytest.mark.parametrize("batch, seq, mean", [(16, 128, 0.37), (8, 512, 0.40), (64, 300, 0.40)])
def test_lengths_are_log_normal_with_the_given_mean_and_a_full_first(batch, seq, mean):
    lengths = spread_lengths(batch, seq)
    assert mean_fill(seq) == mean and len(lengths) == batch and lengths[0] == seq
    assert sum(lengths) / batch / seq == pytest.approx(mean, rel=0.02)
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] >= 1
    # Log-normal: the logarithms are as symmetric about their middle as quantiles of a normal distribution.
    logs = np.log(lengths)
    assert np.mean([logs[0], logs[-1]]) == pytest.approx(np.median(logs), abs=0.08)
    assert math.log(seq) - np.median(logs) > 0.5


@pytest.mark.parametrize("batch, lengths", [(1, [37]), (2, [37, 1])])
def test_where_the_mean_cannot_be_had_the_longest_stays_full(batch, lengths):
    assert spread_lengths(batch, 37) == lengths


@pytest.mark.parametrize(
    "batch, count, rows", [(16, BUCKETS, [4, 4, 4, 4]), (6, 4, [1, 2, 1, 2]), (2, 4, [1, 1]), (5, 1, [5])]
)
def test_buckets_are_all_rows_in_order_each_as_long_as_its_longest(batch, count, rows):
    lengths = spread_lengths(batch, 128)
    parts = buckets(lengths, count)
    assert [rows.stop - rows.start for rows, _ in parts] == rows
    assert [i for rows, _ in parts for i in range(batch)[rows]] == list(range(batch))
    assert all(longest == max(lengths[rows]) for rows, longest in parts)
