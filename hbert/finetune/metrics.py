"""Measures of classification, from counts alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SINGLE, MULTI = ("accuracy", "macro_f1", "mcc"), ("micro_f1", "macro_f1", "exact_match")


def metric_names(multi: bool) -> tuple[str, ...]:
    """The measures of a task; the first chooses the best epoch unless another is asked for."""
    return MULTI if multi else SINGLE


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns int64 counts [C, C]: row = label, column = prediction, of class numbers [N]."""
    pairs = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 and Matthews' correlation coefficient of a confusion matrix [C, C].

    macro_f1 is the mean of 2 tp / (2 tp + fp + fn) over the classes that occur as a label or a prediction.
    mcc is Gorodkin's R_K, (c n - sum_k p_k t_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2)), for c hits among
    n texts, p_k predictions and t_k labels of class k; 0 where all predictions, or all labels, are of one
    class.
    """
    counts = confusion.astype(np.float64)
    hits, labelled, predicted, total = counts.trace(), counts.sum(1), counts.sum(0), counts.sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - labelled @ labelled)
    mcc = (hits * total - predicted @ labelled) / math.sqrt(spread) if spread > 0 else 0.0
    return {
        "accuracy": float(hits / total),
        "macro_f1": _macro_f1(counts.diagonal(), labelled, predicted),
        "mcc": float(mcc),
    }


def multi_label_metrics(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Micro-F1, macro-F1 and exact match of zeros and ones [N, L].

    micro_f1 counts all decisions together, macro_f1 is the mean over the labels that occur or are predicted,
    exact_match the share of texts whose whole set of labels is right. An F1 without any positive is 0.
    """
    truth, guess = labels.astype(bool), predictions.astype(bool)
    hits, labelled, predicted = (truth & guess).sum(0), truth.sum(0), guess.sum(0)
    return {
        "micro_f1": _f1(hits.sum(), labelled.sum(), predicted.sum()),
        "macro_f1": _macro_f1(hits, labelled, predicted),
        "exact_match": float((truth == guess).all(1).mean()),
    }


def per_label(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of texts of each label, of class numbers [N] or zeros and ones [N, L].

    Precision is None where the label was never predicted, recall where it never occurs.
    """
    if labels.ndim == 1:
        labels, predictions = np.eye(num_labels)[labels], np.eye(num_labels)[predictions]
    hits, labelled, predicted = (labels * predictions).sum(0), labels.sum(0), predictions.sum(0)
    return [
        {
            "precision": float(hits[k] / predicted[k]) if predicted[k] else None,
            "recall": float(hits[k] / labelled[k]) if labelled[k] else None,
            "f1": _f1(hits[k], labelled[k], predicted[k]),
            "texts": int(labelled[k]),
        }
        for k in range(num_labels)
    ]


def measure(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> dict[str, float]:
    """The measures of class numbers [N], or of zeros and ones [N, L]."""
    if labels.ndim == 2:
        return multi_label_metrics(labels, predictions)
    return classification_metrics(confusion_matrix(labels, predictions, num_labels))


def decide(scores: np.ndarray, multi: bool, threshold: float = 0.5) -> np.ndarray:
    """Predictions of scores [N, C]: the class of the highest [N], or 1 where above the threshold [N, L]."""
    return (scores > threshold).astype(np.int64) if multi else scores.argmax(1)


def _f1(hits: float, labelled: float, predicted: float) -> float:
    return float(2 * hits / (labelled + predicted)) if labelled + predicted else 0.0


def _macro_f1(hits: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> float:
    occurring = np.flatnonzero(labelled + predicted)
    scores = [_f1(hits[k], labelled[k], predicted[k]) for k in occurring]
    return float(np.mean(scores)) if scores else 0.0
