"""One optimizer step: forward, backward, checks, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from hbert.config import HBertConfig
from hbert.errors import HbertError

from .batches import Batch
from .models import masked_lm_terms
from .optimizers import Optimizers
from .recipes import Recipe

Votes = Callable[[], tuple[int, ...]]
# Sets the dropout's generators apart from those of masks and block order.
_DROPOUT_STREAM = 2


class NonFiniteError(HbertError):
    """A loss or gradient is NaN or infinite; the parameters are those before the step."""


@dataclass(frozen=True)
class StepResult:
    """Of the global batch: mean loss, hits and number of masked tokens, norm of the gradient before clipping.

    ``votes`` are the sums over the processes of what their ``votes()`` returned.
    """

    loss: float
    correct: int
    masked: int
    grad_norm: float
    votes: tuple[int, ...]


class Engine:
    """A model, its optimizers, and the processes that share them.

    Step s seeds torch's generators from (seed, s, rank) and has no other state than parameters and optimizer:
    a step can be repeated, and a run be taken up, exactly.
    """

    def __init__(
        self, accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe, *, seed: int, dtype: str, compiled: bool
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.dtype = dtype
        self._recipe, self._seed = recipe, seed
        self._wrapped = accelerator.prepare_model(model)
        self._forward: Callable[..., Any] = torch.compile(self._wrapped) if compiled else self._wrapped
        self._ours = isinstance(model.config, HBertConfig)
        self.optimizers = Optimizers(model, recipe)
        model.train()

    def step(self, step: int, batch: Batch, lr_factor: float, votes: Votes = tuple) -> StepResult:
        """Takes one step with the mean loss over the masked tokens of the global batch.

        ``votes`` is called once the gradients are there; all processes learn the sums of what it returns.

        Raises:
            NonFiniteError: the loss or the norm of the gradient is not finite; nothing was updated.
        """
        self._seed_dropout(step)
        terms = [self._backward(batch, index) for index in range(len(batch.parts))]
        loss, correct = (torch.stack(column).sum().double() for column in zip(*terms, strict=True))
        gradients = [p.grad for p in self.optimizers.parameters if p.grad is not None]
        norm = get_total_norm(gradients, foreach=True)
        result = self._result(batch, loss, correct, norm, votes())
        if not np.isfinite([result.loss, result.grad_norm]).all():
            found = first_non_finite(self.model) or "the loss itself"
            raise NonFiniteError(
                f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; "
                f"the first tensor that is not finite: {found}"
            )
        if self._recipe.clip:
            clip_grads_with_norm_(self.optimizers.parameters, self._recipe.clip, norm, foreach=True)
        self.optimizers.step(lr_factor)
        return result

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps inside the block leave no trace: weights are put back bit for bit, optimizers made anew."""
        kept = {name: t.clone() for name, t in self.model.state_dict().items()}
        try:
            yield
        finally:
            self.model.load_state_dict(kept)
            self.optimizers = Optimizers(self.model, self._recipe)

    def _seed_dropout(self, step: int) -> None:
        key = (self._seed, step, self.accelerator.process_index, _DROPOUT_STREAM)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)

    def _backward(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Adds one part's gradients; returns its share of the loss and its hits."""
        part = batch.parts[index]
        with self._synchronized(last=index == len(batch.parts) - 1):
            with torch.autocast(part.labels.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
                loss, hits = masked_lm_terms(
                    self._forward, self._ours, part.inputs, part.labels, part.masked, batch.num_masked
                )
            processes = self.accelerator.num_processes
            # Gradients are averaged over the processes, but our loss is the sum of their shares.
            (loss if processes == 1 else loss * processes).backward()
        return loss.detach(), hits

    def _synchronized(self, last: bool) -> AbstractContextManager[None]:
        return self.accelerator.no_sync(self._wrapped) if not last else nullcontext()

    def _result(self, batch: Batch, loss: Tensor, correct: Tensor, norm: Tensor, votes: tuple[int, ...]) -> StepResult:
        mine = torch.cat([torch.stack([loss, correct]), torch.tensor(votes).to(loss)])
        total = self.accelerator.reduce(mine, "sum").tolist()
        return StepResult(
            loss=total[0],
            correct=round(total[1]) if np.isfinite(total[1]) else 0,
            masked=int(batch.num_masked),
            grad_norm=norm.item(),
            votes=tuple(round(value) for value in total[2:]),
        )


def first_non_finite(model: torch.nn.Module) -> str | None:
    """Names the first parameter, else the first gradient, with a NaN or infinite entry; None: there is none."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return None
