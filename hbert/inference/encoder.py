"""An HBERT encoder for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hbert.layers import Carry, norm_of_stream, stream_of
from hbert.layout import Layout, PackedLayout
from hbert.modeling import HBertModel, HBertPreTrainedModel

from .arithmetic import Arithmetic, Floating, Int8
from .kernels import CompiledKernels, Kernels, kernels_for
from .layers import Batch, build
from .smoothing import input_magnitudes


class OptimizedHBertModel(HBertModel):
    """What :class:`hbert.HBertModel` computes in evaluation mode, from weights laid out for it; no gradients.

    Arguments, outputs and errors of a call are those of :meth:`hbert.HBertModel.forward`, but for
    ``output_attentions``, which the packed form has not.
    """

    def __init__(self, source: HBertModel, dtype: str):
        # Not the constructor of HBertModel, which would draw weights.
        HBertPreTrainedModel.__init__(self, copy.deepcopy(source.config))
        self._ops = _arithmetics(source, dtype)
        ops = self._ops[Kernels]
        words = source.embeddings.word_embeddings
        # Where deepcopy meets the token embedding it takes the one that was made for it.
        self.embeddings = copy.deepcopy(source.embeddings, {id(words): ops.embedding(words)}).to(ops.dtype)
        self.norm = None if source.norm is None else copy.deepcopy(source.norm).to(ops.dtype)
        layers = source.layers.named_children()
        self._plan = [build(layer, name, self.config.hidden_act, ops) for name, layer in layers]
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> OptimizedHBertModel:
        """Stays in evaluation mode.

        Raises:
            ValueError: training is asked for.
        """
        if mode:
            raise ValueError("an optimized model cannot be trained: train the original and optimize it again")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedHBertModel:
        # Packed weights cannot follow. Many libraries call .to() with what is there already.
        before = self.embeddings.norm.weight
        after = fn(before.new_empty(0))
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise ValueError(
                f"an optimized model stays {before.dtype} on {before.device}: move or convert the original,"
                " and optimize it again"
            )
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        # Its layers hold no parameters: what would be written is a checkpoint without them.
        raise ValueError("an optimized model has no state_dict: save_pretrained of the whole model writes its original")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an optimized model cannot be copied or pickled: optimize its original once more")

    @torch.no_grad()
    def _encode(self, x: Tensor, layout: Layout, keep_states: bool | None) -> tuple[Tensor, ...]:
        if not isinstance(layout, PackedLayout):
            raise ValueError("an optimized model runs packed: no output_attentions, no attn_implementation='eager'")
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._encode(x, layout, keep_states)
        batch, rows = Batch(self._ops[kernels_for(x)], layout), x.shape[0]
        if (dead := batch.ops.row_count(rows) - rows) > 0:
            x = F.pad(x, (0, 0, 0, dead))
        carry: Carry = (x, None)
        states: list[Tensor] = []
        for layer in self._plan:
            if keep_states:
                states.append(stream_of(carry))
            carry = layer(carry, batch)
        states.append(carry[0] if self.norm is None else norm_of_stream(self.norm, carry)[0])
        return tuple(state[:rows] for state in states)


def _arithmetics(source: HBertModel, dtype: str) -> dict[type[Kernels], Arithmetic]:
    """The arithmetic of that dtype by each of the two kinds of kernels."""
    both = (Kernels, CompiledKernels)
    if dtype == "int8":
        magnitudes = input_magnitudes(source)
        return {kernels: Int8(kernels, magnitudes) for kernels in both}
    storage = torch.bfloat16 if dtype == "bf16" else torch.float32
    return {kernels: Floating(kernels, storage) for kernels in both}
