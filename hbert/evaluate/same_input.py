"""Counting models on the very inputs of an evaluation: what a masked LM has right without learning from context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbert.data.masking import IGNORE_INDEX
from hbert.data.ngram import Ids, count_ngrams
from hbert.data.token_cache import TokenCache

from .held_out import masked_blocks


@dataclass(frozen=True)
class SameInputMarks:
    """Top-1 accuracy on the masked tokens of an evaluation, from its inputs with their 80/10/10 masks.

    Wherever a token stands that is not [MASK], counting models predict that token: of such half are unchanged. At
    [MASK] context_free takes the most frequent token, left_bigram the one that most often follows the left neighbour as
    the input has it, trigram the one that most often stands between both; what was never seen, as behind another
    [MASK], falls back to the next simpler one.

    loss: nats a token of a model without context, which at [MASK] gives the unigram distribution (every count and a
    half), elsewhere half of the probability to the token that stands there and half to that distribution.
    mask_share: of the masked tokens, how many are [MASK]. unigram: the most frequent token, at [MASK] alone.
    """

    context_free: float
    left_bigram: float
    trigram: float
    loss: float
    unigram: float
    mask_share: float
    predictions: int


def same_input_marks(
    cache: TokenCache, length: int, *, rate: float = 0.15, max_blocks: int | None = None, seed: int = 0
) -> SameInputMarks:
    """Predicts what ``evaluate`` with these arguments has a model predict.

    Raises:
        HbertError: the held-out text is shorter than one block.
    """
    blocks = masked_blocks(cache, length, rate=rate, max_blocks=max_blocks, seed=seed)
    rows = [_neighbourhoods(ids, labels, cache.mask_id) for ids, labels in blocks]
    left, shown, right, words = (np.concatenate(column) for column in zip(*rows, strict=True))
    counts = count_ngrams(cache, left, right)
    hidden = shown == cache.mask_id
    commonest, by_left, between = counts.predictions

    def accuracy(at_mask: Ids | int) -> float:
        return float((np.where(hidden, at_mask, shown) == words).mean())

    shares = (counts.unigrams + 0.5) / (counts.unigrams + 0.5).sum()
    likelihood = np.where(hidden, shares[words], 0.5 * (shown == words) + 0.5 * shares[words])
    return SameInputMarks(
        context_free=accuracy(commonest),
        left_bigram=accuracy(by_left),
        trigram=accuracy(between),
        loss=float(-np.log(likelihood).mean()),
        unigram=float((words[hidden] == commonest).mean()) if hidden.any() else float("nan"),
        mask_share=float(hidden.mean()),
        predictions=words.size,
    )


def _neighbourhoods(ids: Ids, labels: Ids, nothing: int) -> tuple[Ids, ...]:
    """Left neighbour, input, right neighbour and target of each masked token of a block; at its edges ``nothing``."""
    masked = labels != IGNORE_INDEX
    padded = np.pad(ids, 1, constant_values=nothing)
    return padded[:-2][masked], ids[masked], padded[2:][masked], labels[masked]
