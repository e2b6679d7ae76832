"""How large each channel of an encoder's normalized inputs is: for int8, where one scale serves a whole row.

A few channels of trained encoders are ten times as large as the rest, and take the resolution of all others in their
row. They are the same channels for every text, so a channel x_j can be divided by s_j and its weights multiplied by it,
with s_j = sqrt(max |x_j| / max |W_j|): then neither rows nor weights have them (Xiao et al. 2023, "SmoothQuant", arXiv
2211.10438, eq. 4, alpha 0.5). The maxima are read from one pass over random token ids: no text is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hbert.modeling import HBertModel

# Random sequences of one pass. Four times as many give no better embeddings (docs/inference.md).
SEQUENCES, LENGTH = 4, 32
_LEAST = 1e-5


@torch.no_grad()
def input_magnitudes(model: HBertModel) -> dict[str, Tensor]:
    """Returns, by the name of each linear layer, the largest magnitude of each of its input channels, float32 [K]."""
    twin = copy.deepcopy(model).eval().float()
    twin.set_attn_implementation("sdpa")
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            found[name] = inputs[0].abs().amax(dim=0)

        return hook

    for name, module in twin.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(record(name))
    length = min(LENGTH, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (SEQUENCES, length), generator=generator)
    twin(ids.to(model.device))
    return found


@torch.no_grad()
def smoothing_scale(magnitude: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Returns s [K] for a row of channels with that magnitude [K], read by weights [N, K]."""
    heaviest = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    return (magnitude.clamp(min=_LEAST) / heaviest.clamp(min=_LEAST)).sqrt()
