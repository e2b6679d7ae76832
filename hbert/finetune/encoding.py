"""Texts as token ids: truncated and counted, kept in flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

_COLUMNS = ("input_ids", "token_type_ids")
_CHUNK = 1024


class EncodedTexts(Dataset[dict[str, Any]]):
    """Token ids of N texts as a map-style data set of ``{"input_ids": [n], ...}``, with labels where given.

    Attributes:
        lengths: int64 [N], tokens of each text, special tokens included.
        num_truncated: how many texts were longer than the limit.
    """

    def __init__(self, columns: dict[str, np.ndarray], lengths: np.ndarray, num_truncated: int):
        self._columns, self.lengths, self.num_truncated = columns, lengths, num_truncated
        self._ends = lengths.cumsum()
        self._labels: np.ndarray | None = None

    def with_labels(self, labels: np.ndarray) -> EncodedTexts:
        """The same texts with class numbers [N] or zeros and ones [N, L]."""
        labelled = EncodedTexts(self._columns, self.lengths, self.num_truncated)
        labelled._labels = labels
        return labelled

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        end = self._ends[index]
        start = end - self.lengths[index]
        item: dict[str, Any] = {name: flat[start:end].tolist() for name, flat in self._columns.items()}
        if self._labels is not None:
            item["labels"] = self._labels[index].tolist()
        return item


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    advance: Callable[[float], None] = lambda count: None,
) -> EncodedTexts:
    """Tokenizes texts, or pairs of them, with the special tokens that the tokenizer adds.

    What exceeds ``max_length`` tokens is cut at the tokenizer's truncation side, of pairs the longer text
    first.

    Args:
        advance: called with the number of texts done since the last call.
    """
    flat: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    num_truncated = 0
    for start in range(0, len(texts), _CHUNK):
        part = slice(start, start + _CHUNK)
        columns = _tokenize(tokenizer, texts[part], None if pairs is None else pairs[part])
        too_long = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
        _truncate(tokenizer, texts[part], None if pairs is None else pairs[part], columns, too_long, max_length)
        num_truncated += len(too_long)
        lengths += map(len, columns["input_ids"])
        for name, rows in columns.items():
            flat.setdefault(name, []).append(np.concatenate([np.asarray(row, np.int32) for row in rows]))
        advance(len(columns["input_ids"]))
    whole = {name: np.concatenate(parts) for name, parts in flat.items()}
    return EncodedTexts(whole, np.array(lengths, np.int64), num_truncated)


def forget_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    """Takes back what its last call left in a tokenizer, and would be saved with it: truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # tokenizers in Python keep nothing
        backend.no_truncation()
        backend.no_padding()


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any
) -> dict[str, list[list[int]]]:
    # verbose: it would warn of texts that are longer than the model can read, which are cut here.
    found = tokenizer(list(texts), None if pairs is None else list(pairs), verbose=False, **options)
    return {name: found[name] for name in _COLUMNS if name in found}


def _truncate(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    columns: dict[str, list[list[int]]],
    which: Sequence[int],
    max_length: int,
) -> None:
    if not which:
        return
    second = None if pairs is None else [pairs[i] for i in which]
    cut = _tokenize(tokenizer, [texts[i] for i in which], second, truncation=True, max_length=max_length)
    for name, rows in cut.items():
        for index, row in zip(which, rows, strict=True):
            columns[name][index] = row
