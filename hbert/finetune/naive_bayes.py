"""The floor: multinomial naive Bayes over words and pairs of words. A pretrained encoder must beat it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

SMOOTHINGS = (1.0, 0.3, 0.1, 0.03)
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def features(text: str) -> list[str]:
    """Lower-case words and punctuation marks, and every two neighbours of these."""
    words = _WORD.findall(text.lower())
    return words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]


class NaiveBayes:
    """log p(c | text) = log p(c) + sum over features f of log((count(f, c) + a) / (count(c) + a V)) + const.

    Features that were not seen in training are ignored; V is the number of those that were.

    Args:
        texts: training texts.
        labels: int64 class numbers [N] in [0, num_classes).
        smoothing: a, added to every count; see :meth:`fit` for a choice.
    """

    def __init__(self, texts: Sequence[str], labels: np.ndarray, num_classes: int, smoothing: float = 1.0):
        counts: Counter[tuple[str, int]] = Counter()
        for text, label in zip(texts, labels.tolist(), strict=True):
            counts.update((feature, label) for feature in features(text))
        self._index = {feature: i for i, feature in enumerate(dict.fromkeys(feature for feature, _ in counts))}
        self._counts = np.zeros((len(self._index), num_classes))
        for (feature, label), count in counts.items():
            self._counts[self._index[feature], label] = count
        with np.errstate(divide="ignore"):  # a class without training texts has a prior of 0
            self._prior = np.log(np.bincount(labels, minlength=num_classes) / len(labels))
        self.smooth(smoothing)

    @classmethod
    def fit(
        cls, texts: Sequence[str], labels: np.ndarray, num_classes: int, valid: Sequence[str], truth: np.ndarray
    ) -> NaiveBayes:
        """Trains with the one of SMOOTHINGS that is most accurate on the validation texts.

        Adding one, the textbook's choice, drowns the counts of rare pairs: it would be a floor too low.
        """
        model = cls(texts, labels, num_classes)
        scores = {}
        for smoothing in SMOOTHINGS:
            model.smooth(smoothing)
            scores[smoothing] = float((model.probabilities(valid).argmax(1) == truth).mean())
        model.smooth(max(SMOOTHINGS, key=scores.__getitem__))
        return model

    def smooth(self, smoothing: float) -> None:
        """Changes what is added to every count."""
        smoothed = self._counts + smoothing
        self.smoothing, self._scores = smoothing, np.log(smoothed / smoothed.sum(0))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Returns p(c | text), float64 [N, C]."""
        scores = np.stack([self._prior + self._evidence(text) for text in texts])
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)

    def _evidence(self, text: str) -> np.ndarray:
        return self._scores[[self._index[f] for f in features(text) if f in self._index]].sum(0)
