"""Packed batches for a DataLoader or the Trainer of transformers: no padding, nothing left to read on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data.masking import IGNORE_INDEX, mask_tokens

_PER_TOKEN = ("token_type_ids", "position_ids")
_SEED_RANGE = 2**62

Example = Mapping[str, Any]


class PackedCollator:
    """Puts tokenized examples behind each other instead of side by side.

    An example has input_ids [n], and as the tokenizer gave them attention_mask (tokens where it is 0 are left
    out), token_type_ids and position_ids; its labels (or ``label``) are int [n], one for each token, or
    anything else that is one for the example: a class, a number, a row of floats.

    In the Trainer, evaluate per-token heads with a padded collator: it cuts the results of the last batch to as many
    rows as there are examples left, and theirs are [T, ...] here. Several GPUs need torchrun: nn.DataParallel would
    split tokens and cu_seqlens by their rows.

    Returns:
        input_ids int64 [T], token_type_ids and position_ids likewise, cu_seqlens int32 [B+1], max_seqlen (an
        int), and labels: [T] or [B, ...]; int64, or float32 for floating ones.

    Raises:
        ValueError: no examples; one without input_ids; some with and some without another column; both
            ``label`` and ``labels``; lengths within an example differ.
    """

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if not examples:
            raise ValueError("a batch needs at least one example")
        columns = {name for example in examples for name in example}
        missing = [name for name in sorted({*columns, "input_ids"}) if any(name not in e for e in examples)]
        if missing:
            raise ValueError(f"examples without {missing[0]}; columns found: {', '.join(sorted(columns))}")
        if {"label", "labels"} <= columns:
            raise ValueError("examples have both label and labels: keep the one that is meant")
        kept = [_kept_tokens(example) for example in examples]
        lengths = [int(keep.sum()) for keep in kept]
        batch: dict[str, Any] = {
            name: torch.cat([_per_token(name, e[name], keep) for e, keep in zip(examples, kept, strict=True)])
            for name in ("input_ids", *_PER_TOKEN)
            if name in columns
        }
        batch["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        batch["max_seqlen"] = max(lengths)
        for name in columns & {"label", "labels"}:
            batch["labels"] = _labels([e[name] for e in examples], kept)
        return batch


class PackedMaskedLMCollator(PackedCollator):
    """:class:`PackedCollator` with BERT's masking, drawn anew at each call from torch's generator.

    Adds labels int64 [T], -100 where not masked, and masked_positions int64 [M], where they stand.

    Args:
        tokenizer: names the mask token and the special tokens, which are never masked.
        rate, mask_replace_prob, random_replace_prob: as in :func:`hbert.data.masking.mask_tokens`.

    Raises:
        ValueError: the tokenizer has no mask token; at a call: as there, or an example has labels already.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rate: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token: masked language modelling needs one")
        self._options: dict[str, Any] = {
            "mask_id": tokenizer.mask_token_id,
            "vocab_size": len(tokenizer),
            "special_ids": tokenizer.all_special_ids,
            "rate": rate,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
        }

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = super().__call__(examples)
        if "labels" in batch:
            raise ValueError("examples have labels, but masking makes its own")
        # A DataLoader gives each of its workers a seed of torch's own.
        rng = np.random.default_rng(int(torch.randint(_SEED_RANGE, ())))
        ids, labels = mask_tokens(batch["input_ids"].numpy(), rng, **self._options)
        masked = torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX))
        return {
            **batch,
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "masked_positions": masked,
        }


def _kept_tokens(example: Example) -> Tensor:
    """bool [n]: which tokens of an example are not padding."""
    ids = torch.as_tensor(example["input_ids"])
    if "attention_mask" not in example:
        return torch.ones(len(ids), dtype=torch.bool)
    return _per_token("attention_mask", example["attention_mask"], torch.ones(len(ids), dtype=torch.bool)) != 0


def _per_token(name: str, values: Any, keep: Tensor) -> Tensor:
    row = torch.as_tensor(values, dtype=torch.int64)
    if row.shape != keep.shape:
        raise ValueError(f"{name} has shape {tuple(row.shape)} where input_ids has {tuple(keep.shape)}")
    return row[keep]


def _labels(values: Sequence[Any], kept: Sequence[Tensor]) -> Tensor:
    rows = [torch.as_tensor(value) for value in values]
    floating = any(row.is_floating_point() for row in rows)
    others = [i for i, (row, keep) in enumerate(zip(rows, kept, strict=True)) if row.shape != keep.shape]
    if not floating and not others:
        return torch.cat([row.long()[keep] for row, keep in zip(rows, kept, strict=True)])
    if any(row.shape != rows[0].shape for row in rows):
        index = others[0] if others else 0
        shape, tokens = tuple(rows[index].shape), tuple(kept[index].shape)
        raise ValueError(
            f"labels of example {index} of the batch have shape {shape}, its input_ids {tokens}; what is not an int for"
            " each token must have the same shape in all examples"
        )
    return torch.stack([row.float() if floating else row.long() for row in rows])
