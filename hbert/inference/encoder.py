"""An HBERT encoder for inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hbert.layers import Carry, norm_of_stream, stream_of
from hbert.layout import Layout, PackedLayout
from hbert.modeling import HBertModel, HBertPreTrainedModel

from .layers import build


class OptimizedHBertModel(HBertModel):
    """What :class:`hbert.HBertModel` computes in evaluation mode, from weights laid out for it; no gradients.

    Arguments, outputs and errors of a call are those of :meth:`hbert.HBertModel.forward`, but for
    ``output_attentions``, which the packed form has not.
    """

    def __init__(self, source: HBertModel, dtype: torch.dtype):
        # Not the constructor of HBertModel, which would draw weights.
        HBertPreTrainedModel.__init__(self, copy.deepcopy(source.config))
        self.embeddings = copy.deepcopy(source.embeddings).to(dtype)
        self.norm = None if source.norm is None else copy.deepcopy(source.norm).to(dtype)
        self._plan = [build(layer, dtype) for layer in source.layers]
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> OptimizedHBertModel:
        """Stays in evaluation mode.

        Raises:
            ValueError: training is asked for.
        """
        if mode:
            raise ValueError("an optimized model cannot be trained: train the original and optimize it again")
        return super().train(False)

    def _save_to_state_dict(self, *_: Any) -> None:
        # Its layers hold no parameters: what would be written is a checkpoint without them.
        raise ValueError("an optimized model has no state_dict: save_pretrained of the whole model writes its original")

    @torch.no_grad()
    def _encode(self, x: Tensor, layout: Layout, keep_states: bool | None) -> tuple[Tensor, ...]:
        if not isinstance(layout, PackedLayout):
            raise ValueError(
                "an optimized model runs packed: no output_attentions, no attn_implementation='eager'"
            )
        carry: Carry = (x, None)
        states: list[Tensor] = []
        for layer in self._plan:
            if keep_states:
                states.append(stream_of(carry))
            carry = layer(carry, layout)
        return *states, carry[0] if self.norm is None else norm_of_stream(self.norm, carry)[0]
