"""Running a model over many texts: batches of similar lengths under a budget of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from hbert.data.terminal import counted

from .encoding import EncodedTexts

BATCH_TOKENS = 8192
POOLINGS = ("mean", "cls")

Readout = Callable[[Any, Tensor], Tensor]


@dataclass
class Runner:
    """Applies a model to encoded texts in order of length and gives results in the order of the texts.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: pads.
        readout: (outputs of the model, attention mask [B, N]) -> [B, W], the result for each text.
        dtype: "fp32", or "bf16" for autocast.
        batch_tokens: rows times columns of a batch at most, unless one text alone is longer.

    Attributes:
        texts, truncated, tokens, seconds: done so far; tokens are those of the texts, without padding.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    readout: Readout
    dtype: str = "fp32"
    batch_tokens: int = BATCH_TOKENS
    texts: int = field(default=0, init=False)
    truncated: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    @torch.inference_mode()
    def run(self, data: EncodedTexts, advance: Callable[[float], None] = lambda count: None) -> np.ndarray:
        """Returns float32 [N, W]; ``advance`` is called with the number of texts done since the last call."""
        collate = DataCollatorWithPadding(self.tokenizer)
        results: np.ndarray | None = None
        started = time.perf_counter()
        for indices in token_batches(data.lengths, self.batch_tokens):
            part = self._batch(collate([data[int(i)] for i in indices]))
            if results is None:
                results = np.empty((len(data), part.shape[1]), np.float32)
            results[indices] = part
            advance(len(indices))
        self.seconds += time.perf_counter() - started
        self.texts += len(data)
        self.truncated += data.num_truncated
        self.tokens += int(data.lengths.sum())
        return np.empty((0, 0), np.float32) if results is None else results

    def _batch(self, inputs: Any) -> np.ndarray:
        inputs = inputs.to(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            outputs = self.model(**inputs)
        return self.readout(outputs, inputs["attention_mask"]).float().cpu().numpy()

    def pace(self) -> str:
        """What was done and how fast, as a text."""
        if not self.texts:
            return "no texts"
        return (
            f"{counted(self.texts, 'text')}, {counted(self.tokens, 'token')} in {self.seconds:.1f} s: "
            f"{self.tokens / self.seconds:,.0f} tokens/s, {1e3 * self.seconds / self.texts:.3g} ms a text"
        )


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Yields indices of batches, the longest texts first: what does not fit into memory fails at once.

    A batch holds at most ``batch_tokens`` tokens with its padding, but at least one text.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


def class_probabilities(multi: bool) -> Readout:
    """Softmax of the logits, or a sigmoid of each where several labels may apply."""

    def readout(outputs: Any, mask: Tensor) -> Tensor:
        logits = outputs.logits.float()
        return logits.sigmoid() if multi else logits.softmax(-1)

    return readout


def pooled_states(pooling: str, normalize: bool) -> Readout:
    """The mean of the final hidden states of a text's tokens, or the first one's; of length 1 if asked."""

    def readout(outputs: Any, mask: Tensor) -> Tensor:
        states = outputs.last_hidden_state.float()
        if pooling == "cls":
            # Not always column 0: a tokenizer may pad on the left.
            first = mask.argmax(1)
            pooled = states[torch.arange(len(states), device=states.device), first]
        else:
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled

    return readout
