"""The forward of a masked-LM model: its head on packed tokens, its loss on the masked ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from hbert.convert.families import Family
from hbert.modeling import IGNORE_INDEX, masked_rows
from hbert_kernels import masked_lm_loss
from hbert_kernels.nn import weight_says_all

from .encoder import Forward, arguments_of, has_patch, in_asked_form, main_input, obstacle, pack_inputs, tell
from .parts import activation_norm, getter, plain_gelu


def masked_lm_forward(family: Family, original: Forward) -> Forward:
    """The forward: packed, or the original where a call asks for what is not packed.

    With labels and in training there are no logits: the head runs on the masked tokens only.
    """
    arguments, decoder = arguments_of(original), getter(family, "head.decoder")
    transform = _transform(family)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = arguments(self, args, kwargs)
        labels = inputs.pop("labels", None)
        encoder = self.base_model
        reason = obstacle(encoder, family, inputs) if has_patch(encoder) else "its encoder is not patched"
        if reason is None and not weight_says_all(decoder(self), nn.Linear):
            reason = f"its decoder is a {type(decoder(self)).__name__} whose weight does not say what it computes"
        if reason is not None:
            tell(self, reason)
            return original(self, *args, **kwargs)
        layout, tokens = pack_inputs(encoder, family, inputs)
        encoded = encoder(**tokens, output_hidden_states=inputs.get("output_hidden_states"), layout=layout)
        hidden, loss, logits = encoded.last_hidden_state, None, None
        if labels is not None:
            labels = layout.pack(labels.to(hidden.device).reshape(main_input(inputs).shape[:2]), IGNORE_INDEX)
            loss = _loss(lambda x: transform(self, x), decoder(self), hidden, labels)
        if labels is None or not self.training:
            logits = layout.unpack(decoder(self)(transform(self, hidden)))
        states = encoded.hidden_states
        states = None if states is None else tuple(layout.unpack(state) for state in states)
        return in_asked_form(self, inputs, MaskedLMOutput(loss, logits, states))

    return forward


def _transform(family: Family) -> Callable[[Any, Tensor], Tensor]:
    """What the decoder sees, of a model and tokens [T, H] -> [T, H]."""
    dense, norm = getter(family, "head.dense"), getter(family, "head.norm")
    activation = getter(family, "head.activation") if family.path("head.activation") else plain_gelu
    own_name = family.fields.get("hidden_act", "hidden_act")

    def transform(model: Any, x: Tensor) -> Tensor:
        name = family.head_activation or getattr(model.config, own_name)
        return activation_norm(norm(model), dense(model)(x), name, activation(model))

    return transform


def _loss(transform: Callable[[Tensor], Tensor], decoder: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels [T] that count; 0 where there are none."""
    hidden, labels = masked_rows(hidden, labels)
    loss, _ = masked_lm_loss(transform(hidden), decoder.weight, decoder.bias, labels, ignore_index=IGNORE_INDEX)
    return loss
