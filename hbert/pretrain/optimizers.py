"""AdamW, or Muon for the matrices of the encoder and AdamW for the rest, behind one learning-rate factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .muon import muon
from .recipes import Recipe


class Optimizers:
    """The optimizers of a model; each peak learning rate is multiplied by the factor of the schedule.

    Weights of linear layers and embedding tables decay; biases, norms, convolution taps and the vectors of
    per-head scorers do not. Under ``muon`` the weights of the encoder's linear layers are updated by Muon
    (Jordan et al. 2024; momentum .95, 5 Newton-Schulz steps), but for those narrower than the model.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe) -> None:
        self.parameters = list(model.parameters())
        matrices = _encoder_matrices(model) if recipe.optimizer == "muon" else []
        self._all: list[torch.optim.Optimizer] = [_adamw(model, matrices, recipe)]
        if matrices:
            self._all.append(muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95))
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def step(self, factor: float) -> None:
        """Updates the parameters at ``factor`` times the peak learning rates, and drops the gradients."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
        for optimizer in self._all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @property
    def kinds(self) -> str:
        """The classes: which Muon it is depends on the device."""
        return ", ".join(type(optimizer).__name__ for optimizer in self._all)

    def state(self) -> list[dict[str, Any]]:
        """Everything that the next step depends on, besides the parameters."""
        return [optimizer.state_dict() for optimizer in self._all]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Puts back what ``state`` returned."""
        for optimizer, entry in zip(self._all, state, strict=True):
            optimizer.load_state_dict(entry)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._all for group in optimizer.param_groups]


def _adamw(model: PreTrainedModel, without: list[Tensor], recipe: Recipe) -> torch.optim.AdamW:
    excluded = {id(p) for p in without}
    decaying = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    rest = [p for p in model.parameters() if id(p) not in excluded]
    groups = [
        {"params": [p for p in rest if id(p) in decaying], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if id(p) not in decaying], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=betas, fused=True)


def _encoder_matrices(model: PreTrainedModel) -> list[Tensor]:
    width = model.config.hidden_size
    linears = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    return [m.weight for m in linears if min(m.weight.shape) >= width]
