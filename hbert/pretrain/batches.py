"""The rows of one process of every step's global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hbert.data import MaskedBatch, MaskedBatches, TokenCache
from hbert.data.masking import IGNORE_INDEX

from .recipes import Recipe
from .schedule import BatchPlan


@dataclass(frozen=True)
class Part:
    """What one forward pass takes: the model's inputs, labels, and how many of its tokens are masked."""

    inputs: dict[str, Any]
    labels: Tensor
    masked: int


@dataclass(frozen=True)
class Batch:
    """A process's parts of a step; ``num_masked`` (int64 scalar tensor) and ``blocks`` are of all processes."""

    parts: list[Part]
    num_masked: Tensor
    blocks: int


class StepBatches:
    """The batch of step s: a pure function of (seed, s), the same for any number of processes.

    Each process makes the whole batch, which is cheap, and takes its rows: so all know the number of masked
    tokens that the loss is divided by without asking each other.

    Raises:
        ValueError: the text is shorter than one block, or a batch has fewer blocks than there are processes
            times accumulation passes.
    """

    def __init__(
        self, cache: TokenCache, recipe: Recipe, seed: int, device: torch.device, *, rank: int = 0, processes: int = 1
    ) -> None:
        self._stream = MaskedBatches(
            cache,
            cache.train.blocks(recipe.block_size),
            recipe.batch_size,
            seed=seed,
            rate=recipe.masking_rate,
            mask_replace_prob=recipe.mask_replace,
            random_replace_prob=recipe.random_replace,
        )
        smallest = recipe.ramp_start or recipe.batch_size
        if smallest < processes * recipe.accumulate:
            raise ValueError(
                f"a batch of {smallest} blocks cannot be split over {processes} processes x "
                f"{recipe.accumulate} accumulation passes"
            )
        self._first_id = cache.special_ids["[CLS]"]
        self._borders, self._accumulate = recipe.document_borders, recipe.accumulate
        self._rank, self._processes, self._device = rank, processes, device

    def of(self, step: int, plan: BatchPlan) -> Batch:
        """The batch of a step of the run."""
        return self.at(step, plan.start(step), plan.size(step))

    def at(self, step: int, start: int, count: int) -> Batch:
        """``count`` blocks from position ``start`` of the stream, with the masks of step ``step``."""
        whole = self._stream.at(step, start, count)
        passes = np.array_split(np.arange(count), self._processes * self._accumulate)
        mine = passes[self._rank * self._accumulate :][: self._accumulate]
        masked = int((whole.labels != IGNORE_INDEX).sum())
        return Batch([self._part(whole, rows) for rows in mine], self._tensor(np.array(max(masked, 1))), count)

    def _part(self, whole: MaskedBatch, rows: NDArray[np.int64]) -> Part:
        ids, labels = whole.input_ids[rows], whole.labels[rows]
        masked = int((labels != IGNORE_INDEX).sum())
        if not self._borders:
            return Part({"input_ids": self._tensor(ids)}, self._tensor(labels), masked)
        inputs = {
            "input_ids": self._tensor(ids.ravel()),
            "cu_seqlens": self._tensor(self._document_starts(ids)),
            "max_seqlen": ids.shape[1],
        }
        return Part(inputs, self._tensor(labels.ravel()), masked)

    def _document_starts(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32 [sequences + 1]: a sequence starts with every block and with every [CLS], which is never masked."""
        starts = ids == self._first_id
        starts[:, 0] = True
        return np.append(np.flatnonzero(starts), ids.size).astype(np.int32)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)
