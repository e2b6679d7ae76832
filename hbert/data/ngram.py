"""n-gram marks: top-1 accuracy of counting models on held-out tokens, which a masked LM has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbert.errors import HbertError

from .terminal import progress
from .token_cache import TokenCache

COMMON_TOKENS = 150
_CHUNK = 1 << 21

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class NgramMarks:
    """Top-1 accuracy at one held-out token with every other token visible; special tokens are not predicted.

    unigram: the most frequent token. left_bigram: the token that most often follows the left neighbour, else
    the unigram. trigram: the token that most often stands between the two neighbours, else the left bigram.
    trigram_rare: the trigram where the true token is not among the ``COMMON_TOKENS`` most frequent.
    context_seen: share of the predictions whose pair of neighbours occurs in the training text.
    entropy: unigram entropy of the training text, in bits.
    """

    unigram: float
    left_bigram: float
    trigram: float
    trigram_rare: float
    context_seen: float
    entropy: float
    predictions: int


def ngram_marks(cache: TokenCache) -> NgramMarks:
    """Counts the training tokens and predicts the held-out ones; ties go to the smallest id.

    Only contexts that occur in the held-out tokens are counted, chunk by chunk of the training stream: memory
    grows with what was counted for them, not with the length of the corpus.

    Raises:
        HbertError: the held-out split has no token to predict.
    """
    special = np.fromiter(cache.special_ids.values(), dtype=np.int64)
    left, words, right = _neighbourhoods(cache.held_out.tokens, special)
    if not words.size:
        raise HbertError("no held-out token to predict: the corpus has too few documents")
    return _marks(words, count_ngrams(cache, left, right))


@dataclass(frozen=True)
class NgramCounts:
    """What counting the training tokens says of queries (left [P], right [P]); special tokens are not counted.

    unigrams: how often each token occurs, [V]. by_left: the token that most often follows ``left``, [P], -1 where that
    was never seen. between: the one that most often stands between ``left`` and ``right``, likewise.
    """

    unigrams: Ids
    by_left: Ids
    between: Ids

    @property
    def predictions(self) -> tuple[int, Ids, Ids]:
        """The most frequent token; the left bigram, else that; the trigram, else the left bigram."""
        commonest = int(self.unigrams.argmax())
        left = np.where(self.by_left >= 0, self.by_left, commonest)
        return commonest, left, np.where(self.between >= 0, self.between, left)


def count_ngrams(cache: TokenCache, left: Ids, right: Ids) -> NgramCounts:
    """Counts the training tokens for these queries, both int64 [P]; ties go to the smallest id."""
    special, vocab = np.fromiter(cache.special_ids.values(), dtype=np.int64), cache.vocab_size
    unigrams = np.zeros(vocab, dtype=np.int64)
    bigrams, trigrams = _ContextCounter(left, vocab), _ContextCounter(left * vocab + right, vocab)
    for before, target, after in _chunks(cache.train.tokens, special):
        unigrams += np.bincount(target, minlength=vocab)
        bigrams.add(before, target)
        trigrams.add(before * vocab + after, target)
    return NgramCounts(unigrams, bigrams.most_frequent(), trigrams.most_frequent())


class _ContextCounter:
    """Counts which words stand in the contexts of ``queries`` [P]; other contexts are not counted."""

    def __init__(self, queries: Ids, vocab_size: int) -> None:
        self._contexts, self._query_slots = np.unique(queries, return_inverse=True)
        self._vocab_size = vocab_size
        self._keys = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)
        self._pending: list[tuple[Ids, Ids]] = []

    def add(self, contexts: Ids, words: Ids) -> None:
        slots = np.searchsorted(self._contexts, contexts)
        slots[slots == len(self._contexts)] = 0
        hit = self._contexts[slots] == contexts
        keys, counts = np.unique(slots[hit] * self._vocab_size + words[hit], return_counts=True)
        self._pending.append((keys, counts))
        # Merging only when as much is pending as is merged keeps the total work linear.
        if sum(len(pending) for pending, _ in self._pending) >= len(self._keys):
            self._merge()

    def most_frequent(self) -> Ids:
        """Returns the commonest word in the context of every query [P], -1 where it was never seen."""
        self._merge()
        slots, words = np.divmod(self._keys, self._vocab_size)
        order = np.lexsort((-self._counts, slots))
        best_slots, first = np.unique(slots[order], return_index=True)
        predicted = np.full(len(self._contexts), -1, dtype=np.int64)
        predicted[best_slots] = words[order][first]
        return predicted[self._query_slots]

    def _merge(self) -> None:
        parts = [(self._keys, self._counts), *self._pending]
        keys, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        self._keys, inverse = np.unique(keys, return_inverse=True)
        self._counts = np.zeros(len(self._keys), dtype=np.int64)
        np.add.at(self._counts, inverse, counts)
        self._pending = []


def _chunks(tokens: NDArray[Any], special: Ids) -> Iterator[tuple[Ids, Ids, Ids]]:
    with progress("count n-grams", len(tokens)) as advance:
        for start in range(0, len(tokens) - 2, _CHUNK):
            yield _neighbourhoods(tokens[start : start + _CHUNK + 2], special)
            advance(_CHUNK)


def _neighbourhoods(tokens: NDArray[Any], special: Ids) -> tuple[Ids, Ids, Ids]:
    """Returns (left neighbour, word, right neighbour), each [P], of the inner tokens that are not special."""
    ids = tokens.astype(np.int64)
    keep = ~np.isin(ids[1:-1], special)
    return ids[:-2][keep], ids[1:-1][keep], ids[2:][keep]


def _marks(words: Ids, counts: NgramCounts) -> NgramMarks:
    unigrams = counts.unigrams
    commonest, left, between = counts.predictions
    by_frequency = np.argsort(-unigrams, kind="stable")
    rare = ~np.isin(words, by_frequency[:COMMON_TOKENS])
    shares = unigrams[unigrams > 0] / unigrams.sum()
    return NgramMarks(
        unigram=float((words == commonest).mean()),
        left_bigram=float((words == left).mean()),
        trigram=float((words == between).mean()),
        trigram_rare=float((words == between)[rare].mean()) if rare.any() else float("nan"),
        context_seen=float((counts.between >= 0).mean()),
        entropy=float(-(shares * np.log2(shares)).sum()),
        predictions=words.size,
    )
