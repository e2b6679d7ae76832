"""Masked language modelling inputs as pure functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .token_cache import Blocks, TokenCache

IGNORE_INDEX = -100
# Sets the generators of the passes apart from those of the steps.
_ORDER_STREAM = 1


def step_rng(seed: int, step: int) -> np.random.Generator:
    """Returns the random generator of one training step: a pure function of (seed, step)."""
    return np.random.default_rng((seed, step))


def mask_tokens(
    ids: NDArray[np.integer],
    rng: np.random.Generator,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Collection[int],
    rate: float = 0.15,
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Masks tokens as BERT does (Devlin et al. 2019, section 3.1).

    Every token that is not special is chosen with probability ``rate``, independently. A chosen one is
    replaced by ``mask_id`` with probability ``mask_replace_prob``, by a uniformly drawn token that is not
    special with ``random_replace_prob``, and stays as it is otherwise.

    Args:
        ids: token ids of any shape and integer dtype; not changed.

    Returns:
        (input_ids, labels), int64 of the same shape; labels are the original ids where chosen, else -100.

    Raises:
        ValueError: a probability outside [0, 1], replacement probabilities that sum to more than 1, an id
            outside [0, vocab_size), or a vocabulary of special tokens only.
    """
    _check_probabilities(rate, mask_replace_prob, random_replace_prob)
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids span [{ids.min()}, {ids.max()}]; allowed is [0, {vocab_size})")
    special = np.array([mask_id, *special_ids])
    if special.min() < 0 or special.max() >= vocab_size:
        raise ValueError(f"mask_id and special_ids are {special.tolist()}; allowed is [0, {vocab_size})")
    is_special = np.zeros(vocab_size, dtype=bool)
    is_special[special] = True
    ordinary = np.flatnonzero(~is_special)
    if not ordinary.size:
        raise ValueError(f"all {vocab_size} tokens of the vocabulary are special")
    chosen = (rng.random(ids.shape) < rate) & ~is_special[ids]
    kind = rng.random(ids.shape)
    drawn = ordinary[rng.integers(ordinary.size, size=ids.shape)]
    replaced = np.where(kind < mask_replace_prob, mask_id, drawn)
    changed = chosen & (kind < mask_replace_prob + random_replace_prob)
    return np.where(changed, replaced, ids), np.where(chosen, ids, IGNORE_INDEX)


def _check_probabilities(rate: float, mask: float, random: float) -> None:
    values = {"rate": rate, "mask_replace_prob": mask, "random_replace_prob": random}
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; allowed is [0, 1]")
    if mask + random > 1 + 1e-9:
        raise ValueError(f"mask_replace_prob + random_replace_prob is {mask + random}; allowed is at most 1")


@dataclass(frozen=True)
class MaskedBatch:
    """``input_ids`` and ``labels`` (-100: not masked), both int64 [batch, length]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]


class MaskedBatches:
    """Masked batches of shuffled blocks: ``batches[step]`` is a pure function of (seed, step), step >= 0.

    Each pass over the blocks has its own permutation, drawn from (seed, pass); a batch may span two passes.

    Raises:
        ValueError: there is no block, or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        cache: TokenCache,
        blocks: Blocks,
        batch_size: int,
        *,
        seed: int = 0,
        rate: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
    ) -> None:
        if not len(blocks):
            raise ValueError("the split is shorter than one block: use shorter blocks or more text")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self._blocks, self._batch_size, self._seed = blocks, batch_size, seed
        self._options: dict[str, Any] = {
            "mask_id": cache.mask_id,
            "vocab_size": cache.vocab_size,
            "special_ids": cache.special_ids.values(),
            "rate": rate,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
        }
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, step: int) -> MaskedBatch:
        return self.at(step, step * self._batch_size, self._batch_size)

    def at(self, step: int, start: int, count: int) -> MaskedBatch:
        """Returns ``count`` blocks from position ``start`` of the shuffled stream, masked as step ``step``.

        For steps of different sizes; where all are of ``batch_size``, it is what ``batches[step]`` gives.
        """
        if step < 0:
            raise IndexError(f"step is {step}; steps count from 0")
        ids = self._blocks[self._indices(start, count)]
        return MaskedBatch(*mask_tokens(ids, step_rng(self._seed, step), **self._options))

    def _indices(self, start: int, count: int) -> NDArray[np.int64]:
        passes, ranks = np.divmod(np.arange(start, start + count), len(self._blocks))
        return np.array([self._order(int(number))[rank] for number, rank in zip(passes, ranks, strict=True)])

    def _order(self, number: int) -> NDArray[np.int64]:
        if number not in self._orders:
            # Only a batch at the seam needs two passes, and steps mostly go forward.
            self._orders = {key: order for key, order in self._orders.items() if key == number - 1}
            self._orders[number] = np.random.default_rng((self._seed, number, _ORDER_STREAM)).permutation(
                len(self._blocks)
            )
        return self._orders[number]
