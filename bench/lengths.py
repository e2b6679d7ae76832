"""The lengths of the sequences in a padded batch, and the calls that sorting them by length makes of it."""

from __future__ import annotations

from math import exp
from statistics import NormalDist

BUCKETS = 4
_SHORT, _SHORT_FILL, _FILL = 128, 0.37, 0.40
_WIDEST = 20.0  # of a log-normal distribution; beyond it nothing but the longest sequence is left
_HALVINGS = 60


def mean_fill(seq: int) -> float:
    """The mean length over the longest: 0.37 up to 128 tokens, 0.40 above."""
    return _SHORT_FILL if seq <= _SHORT else _FILL


def spread_lengths(batch: int, seq: int) -> list[int]:
    """`batch` log-normal lengths, from the longest, `seq`, downwards; their mean is `mean_fill`, where that can be had.

    They are the distribution's quantiles (i + 1/2) / batch, so the same at every call; its width makes the mean.
    """
    quantiles = [NormalDist().inv_cdf((i + 0.5) / batch) for i in reversed(range(batch))]
    below = [quantile - quantiles[0] for quantile in quantiles]

    def fill(width: float) -> float:
        return sum(exp(width * distance) for distance in below) / batch

    low, high = 0.0, _WIDEST
    for _ in range(_HALVINGS):  # the mean falls with the width
        middle = (low + high) / 2
        low, high = (middle, high) if fill(middle) > mean_fill(seq) else (low, middle)
    return [max(1, round(seq * exp(low * distance))) for distance in below]


def buckets(lengths: list[int], count: int) -> list[tuple[slice, int]]:
    """`count` parts of a batch that is sorted from the longest downwards, as equal as can be: (rows, longest)."""
    bounds = [len(lengths) * i // count for i in range(count + 1)]
    return [(slice(a, b), lengths[a]) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
