"""Held-out loss and top-1 accuracy of any masked language model, per source of text, on fixed masks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from hbert.data.masking import IGNORE_INDEX, mask_tokens
from hbert.data.token_cache import Blocks, TokenCache
from hbert.errors import HbertError
from hbert.modeling import HBertForMaskedLM

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class SourceResult:
    """What one source gave: ``loss`` in nats per masked token, ``accuracy`` the share of top-1 hits.

    ``mask_accuracy`` is that at [MASK] alone, None where none stood. Of the others of 80/10/10 half can be copied from
    the input: a model without context has some 13% of all masked tokens right (``same_input_marks``).
    """

    loss: float
    accuracy: float
    mask_accuracy: float | None
    num_masked: int

    @property
    def bits(self) -> float:
        """The loss in bits per masked token."""
        return self.loss / math.log(2)


@dataclass(frozen=True)
class EvalResult(SourceResult):
    """The mean over all masked tokens, and the same for every source that has at least one of them."""

    per_source: dict[str, SourceResult]


def evaluate(
    model: PreTrainedModel,
    cache: TokenCache,
    length: int,
    *,
    rate: float = 0.15,
    batch_size: int = 16,
    max_blocks: int | None = None,
    seed: int = 0,
    dtype: str = "fp32",
    advance: Callable[[float], None] | None = None,
) -> EvalResult:
    """Predicts masked tokens of the held-out text, cut per source into blocks of ``length`` tokens.

    The mask of a block (80/10/10, as in training) is a pure function of (seed, source, index of the block):
    it is the same for every model and batch size. Dropout is off; the mode of every module is put back. No
    random number of torch is drawn.

    Args:
        model: :class:`HBertForMaskedLM`, whose head then runs on the masked tokens only, or any masked-LM
            model of transformers; not wrapped for compilation or several processes.
        max_blocks: at most so many blocks, evenly spaced over the text of all sources; None: all.
        dtype: "fp32" (the dtype of the weights), or "bf16" for autocast.
        advance: called with the number of blocks after each batch.

    Raises:
        ValueError: rate outside (0, 1], a size or count below 1, or an unknown dtype.
        HbertError: the held-out text is shorter than one block; nothing was masked; the model has fewer
            token embeddings than the tokenizer has pieces, or fewer positions than ``length``.
    """
    check_arguments(length, rate, batch_size, max_blocks, dtype)
    check_model(model, cache.vocab_size, length)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")
    results: dict[str, SourceResult] = {}
    total = _Sums()
    with _evaluating(model), torch.inference_mode(), autocast:
        for name, blocks, indices in _sampled_blocks(cache, length, max_blocks):
            masker, sums = _Masker(cache, name, rate, seed), _Sums()
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                input_ids, labels = masker.batch(blocks, part, device)
                sums += _score(model, input_ids, labels, cache.mask_id)
                if advance is not None:
                    advance(len(part))
            if sums.count:
                results[name] = sums.result()
                total += sums
    if not total.count:
        raise HbertError("no held-out token was masked: use a higher rate or more text")
    return EvalResult(**vars(total.result()), per_source=results)


def masked_blocks(
    cache: TokenCache, length: int, *, rate: float = 0.15, max_blocks: int | None = None, seed: int = 0
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields (input_ids, labels), each [length], of every block that ``evaluate`` predicts with these arguments.

    Raises:
        HbertError: the held-out text is shorter than one block.
    """
    for name, blocks, indices in _sampled_blocks(cache, length, max_blocks):
        masker = _Masker(cache, name, rate, seed)
        for index in indices:
            yield masker.block(blocks, int(index))


def check_model(model: PreTrainedModel, vocab_size: int, length: int) -> None:
    """Checks that the model can embed ``vocab_size`` token ids and sequences of ``length`` tokens.

    Raises:
        HbertError: it cannot.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if rows < vocab_size:
        raise HbertError(
            f"the vocabulary does not match: the tokenizer has {vocab_size:,} pieces, but the model has {rows:,} "
            "token embeddings"
        )
    positions = max_positions(model)
    if positions is not None and length > positions:
        raise HbertError(f"blocks of {length} tokens are too long: the model has {positions} positions")


def count_blocks(cache: TokenCache, length: int) -> int:
    """Returns how many held-out blocks of ``length`` tokens the sources have, each without its remainder."""
    return sum(map(len, _source_blocks(cache, length).values()))


def _source_blocks(cache: TokenCache, length: int) -> dict[str, Blocks]:
    return {name: cache.held_out.source(name).blocks(length) for name in cache.held_out.spans}


def max_positions(model: PreTrainedModel) -> int | None:
    """Returns the longest sequence that the model takes; None: no limit is known."""
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind the padding id.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None)


def check_arguments(length: int, rate: float, batch_size: int, max_blocks: int | None, dtype: str = "fp32") -> None:
    """Checks the arguments of ``evaluate`` that need neither model nor text.

    Raises:
        ValueError: rate outside (0, 1], a size or count below 1, or an unknown dtype.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"the masking rate is {rate}; allowed is (0, 1]")
    for name, value in {"length": length, "batch_size": batch_size, "max_blocks": max_blocks}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _sampled_blocks(
    cache: TokenCache, length: int, max_blocks: int | None
) -> Iterator[tuple[str, Blocks, NDArray[np.int64]]]:
    """Yields (source, its blocks, the indices to take), without sources of which none is taken."""
    total = count_blocks(cache, length)
    if not total:
        raise HbertError(f"the held-out text of every source is shorter than one block of {length} tokens")
    count = total if max_blocks is None else min(max_blocks, total)
    # The middles of equal parts of all blocks in a row: each source gives its share, evenly spaced.
    chosen = (2 * np.arange(count) + 1) * total // (2 * count)
    first = 0
    for name, blocks in _source_blocks(cache, length).items():
        indices = chosen[(chosen >= first) & (chosen < first + len(blocks))] - first
        if indices.size:
            yield name, blocks, indices
        first += len(blocks)


class _Masker:
    def __init__(self, cache: TokenCache, source: str, rate: float, seed: int) -> None:
        digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
        self._key = (seed, int.from_bytes(digest, "big"))
        self._options: dict[str, Any] = {
            "mask_id": cache.mask_id,
            "vocab_size": cache.vocab_size,
            "special_ids": cache.special_ids.values(),
            "rate": rate,
        }

    def batch(self, blocks: Blocks, indices: NDArray[np.int64], device: torch.device) -> list[Tensor]:
        """Returns input_ids and labels of these blocks, both int64 [len(indices), length]."""
        pairs = [self.block(blocks, int(index)) for index in indices]
        return [torch.from_numpy(np.stack(column)).to(device) for column in zip(*pairs, strict=True)]

    def block(self, blocks: Blocks, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns input_ids and labels of one block, both int64 [length]."""
        return mask_tokens(blocks[index], np.random.default_rng((*self._key, index)), **self._options)


@dataclass
class _Sums:
    """Over masked tokens; ``mask_hits`` and ``mask_count`` over those whose input is [MASK]."""

    loss: float = 0.0
    hits: int = 0
    count: int = 0
    mask_hits: int = 0
    mask_count: int = 0

    def __iadd__(self, other: _Sums) -> _Sums:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def result(self) -> SourceResult:
        """The means."""
        at_mask = self.mask_hits / self.mask_count if self.mask_count else None
        return SourceResult(self.loss / self.count, self.hits / self.count, at_mask, self.count)


def _score(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, mask_id: int) -> _Sums:
    """The sums of one batch."""
    masked = labels != IGNORE_INDEX
    targets, at_mask = labels[masked], input_ids[masked] == mask_id
    score: Callable[[Tensor, Tensor], tuple[float, int]] = _score_logits
    if isinstance(model, HBertForMaskedLM):
        # Not through its forward, which in evaluation also makes the logits of all tokens.
        score = partial(_score_hidden, model)
        rows = model.hbert(input_ids=input_ids).last_hidden_state[masked]
    else:
        rows = model(input_ids=input_ids).logits[masked]
    (loss, hits), (other_loss, other_hits) = (score(rows[part], targets[part]) for part in (at_mask, ~at_mask))
    return _Sums(loss + other_loss, hits + other_hits, len(targets), hits, int(at_mask.sum()))


def _score_hidden(model: HBertForMaskedLM, hidden: Tensor, targets: Tensor) -> tuple[float, int]:
    loss, _, hits = model.masked_loss(hidden, targets, divisor=1)
    return loss.item(), int(hits)


def _score_logits(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum").item(), int((logits.argmax(-1) == targets).sum())
