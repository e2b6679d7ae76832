"""Is the difference of two models on one test split more than chance? McNemar's test and a paired bootstrap.

    compare("bert/predictions/seed-0.tsv", "hbert/predictions/seed-0.tsv")

The files are those that ``hbert finetune`` leaves; several seeds of a model are given as a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hbert.errors import HbertError

from .metrics import classification_metrics, confusion_matrix
from .predictions import read_predictions

METRICS = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Interval:
    """A difference (second minus first) with its bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two models on one test split.

    Attributes:
        metric: of the other entries, but for ``mcnemar_p``.
        first, second: the measure of each, the mean over its seeds.
        interval: their difference and its 95% interval over the choice of test texts.
        only_first, only_second: texts that only one of the two had right, summed over pairs of seeds.
        mcnemar_p: for each pair of seeds, the exact p-value that both are equally accurate.
    """

    metric: str
    first: float
    second: float
    interval: Interval
    only_first: int
    only_second: int
    mcnemar_p: tuple[float, ...]


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: 2 P(X <= min(b, c)) for X ~ Binomial(b + c, 1/2), at most 1.

    Args:
        only_first, only_second: b and c, texts that only one of the two models had right.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    # Python's integers: exact for any n.
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_bootstrap(
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    metric: str = "accuracy",
    *,
    samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a difference of measures over resampled texts, the same texts for both models.

    Args:
        labels: int64 class numbers [N].
        first, second: predictions [S, N] of S seeds, any number for either; the measure is their mean.
        metric: "accuracy" or "macro_f1".
        samples, level, seed: number of resamplings, confidence level, and seed of the draws.

    Raises:
        ValueError: another metric, or values out of range.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}")
    if samples < 1 or not 0 < level < 1 or not len(labels):
        raise ValueError(f"samples is {samples}, level {level}, {len(labels)} texts: at least 1, in (0, 1), at least 1")
    score = _scorer(metric, labels, np.atleast_2d(first), np.atleast_2d(second))
    rng = np.random.default_rng(seed)
    texts = len(labels)
    drawn = [score(np.bincount(rng.integers(0, texts, texts), minlength=texts)) for _ in range(samples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(score(np.ones(texts, np.int64)), float(low), float(high))


def compare(
    first: str | Path | Sequence[str | Path],
    second: str | Path | Sequence[str | Path],
    metric: str = "accuracy",
    samples: int = 10_000,
) -> Comparison:
    """Compares files of predictions on the same labelled texts; positive is in favour of ``second``.

    For tasks with one label a text; a set of labels counts as one name.

    Raises:
        HbertError: a file is missing or not one of predictions, or the labels of two files differ.
        ValueError: another metric than "accuracy" and "macro_f1".
    """
    labels, predictions = _read([*_list(first), *_list(second)])
    mine, theirs = predictions[: len(_list(first))], predictions[len(_list(first)) :]
    interval = paired_bootstrap(labels, mine, theirs, metric, samples=samples)
    discordant = [_discordant(labels, a, b) for a, b in zip(mine, theirs, strict=False)]
    means = [float(np.mean([_score(metric, labels, row) for row in rows])) for rows in (mine, theirs)]
    return Comparison(
        metric,
        means[0],
        means[1],
        interval,
        sum(b for b, _ in discordant),
        sum(c for _, c in discordant),
        tuple(mcnemar(b, c) for b, c in discordant),
    )


def _list(files: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [files] if isinstance(files, str | Path) else files


def _read(paths: Sequence[str | Path]) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and predictions [number of files, N] as class numbers."""
    found = [read_predictions(path) for path in paths]
    labels = found[0][0]
    for path, (others, _) in zip(paths, found, strict=True):
        if not np.array_equal(labels, others):
            raise HbertError(f"{paths[0]} and {path} are not predictions on the same labelled texts")
    if not len(labels):
        raise HbertError(f"{paths[0]} has no predictions")
    columns = np.stack([labels, *(predictions for _, predictions in found)])
    numbers = np.unique(columns, return_inverse=True)[1].reshape(columns.shape)
    return numbers[0], numbers[1:]


def _discordant(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    mine, theirs = first == labels, second == labels
    return int((mine & ~theirs).sum()), int((theirs & ~mine).sum())


def _score(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    classes = int(max(labels.max(), predictions.max())) + 1
    return classification_metrics(confusion_matrix(labels, predictions, classes))[metric]


def _scorer(metric: str, labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> Callable[[np.ndarray], float]:
    """The difference of the measures where each text counts as often as given, int64 [N]."""
    if metric == "accuracy":
        gain = (second == labels).mean(0) - (first == labels).mean(0)
        return lambda times: float(times @ gain / times.sum())

    def difference(times: np.ndarray) -> float:
        drawn = np.repeat(np.arange(len(labels)), times)
        scores = [np.mean([_score(metric, labels[drawn], row[drawn]) for row in rows]) for rows in (first, second)]
        return float(scores[1] - scores[0])

    return difference
