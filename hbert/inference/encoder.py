"""An HBERT encoder for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hbert.layers import Carry, stream_of
from hbert.layout import Layout, PackedLayout
from hbert.modeling import HBertModel, HBertPreTrainedModel
from hbert_kernels._program import Program, Recorder
from hbert_kernels.ops.additive_attention import prefers_key_free

from .arithmetic import Arithmetic, Floating, Int8, whole
from .kernels import CompiledKernels, Kernels, RecordedKernels, runs_compiled
from .layers import Batch, build
from .linear import row_count
from .smoothing import input_magnitudes


class OptimizedHBertModel(HBertModel):
    """What :class:`hbert.HBertModel` computes in evaluation mode, from weights laid out for it; no gradients.

    Arguments, outputs and errors of a call are those of :meth:`hbert.HBertModel.forward`, but for
    ``output_attentions``, which the packed form has not.
    """

    def __init__(self, source: HBertModel, dtype: str):
        # Not the constructor of HBertModel, which would draw weights.
        HBertPreTrainedModel.__init__(self, copy.deepcopy(source.config))
        # "eager" computes the same, but not packed.
        self.set_attn_implementation("sdpa")
        self._arithmetic = _arithmetic(source, dtype)
        ops = self._arithmetic(Kernels())
        words = source.embeddings.word_embeddings
        # Where deepcopy meets the token embedding it takes the one that was made for it.
        self.embeddings = copy.deepcopy(source.embeddings, {id(words): ops.embedding(words)}).to(ops.dtype)
        self._norm = None if source.norm is None else whole(source.norm)
        layers = source.layers.named_children()
        self._plan = [build(layer, name, self.config.hidden_act, ops) for name, layer in layers]
        self._is_recordable = ops.is_recordable
        # By what a recording depends on: key_free of the batch, keep_states.
        self._programs: dict[tuple[bool, bool], Program] = {}
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
        compiled, keep, rows = runs_compiled(x), bool(keep_states), x.shape[0]
        key_free = prefers_key_free(rows, layout.cu_seqlens.shape[0] - 1, self.config.scorer)
        if compiled and self._is_recordable:
            return tuple(self._program(layout, key_free, keep)(x, layout.cu_seqlens))
        if not self._is_recordable and (dead := row_count(rows) - rows) > 0:
            x = F.pad(x, (0, 0, 0, dead))
        ops = self._arithmetic(CompiledKernels() if compiled else Kernels())
        return tuple(state[:rows] for state in self._run(x, Batch(ops, layout, key_free), keep))

    def _run(self, x: Any, batch: Batch, keep_states: bool) -> list[Any]:
        """The final output; with ``keep_states``, before it the residual stream in front of each layer."""
        carry: Carry = (x, None)
        states = []
        for layer in self._plan:
            if keep_states:
                states.append(stream_of(carry))
            carry = layer(carry, batch)
        x, norm = stream_of(carry), self._norm
        if norm is not None:
            x = batch.ops.kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return [*states, x]

    def _program(self, layout: PackedLayout, key_free: bool, keep_states: bool) -> Program:
        """The recording of :meth:`_run`."""
        key = key_free, keep_states
        if key not in self._programs:
            recorder = Recorder(layout.cu_seqlens)
            batch = Batch(self._arithmetic(RecordedKernels(recorder)), layout, key_free)
            self._programs[key] = recorder.program(self._run(recorder.x, batch, keep_states))
        return self._programs[key]


def _arithmetic(source: HBertModel, dtype: str) -> Callable[[Kernels], Arithmetic]:
    """The arithmetic of that dtype, by the kernels that compute."""
    if dtype == "int8":
        magnitudes = input_magnitudes(source)
        return lambda kernels: Int8(kernels, magnitudes)
    storage = torch.bfloat16 if dtype == "bf16" else torch.float32
    return lambda kernels: Floating(kernels, storage)
