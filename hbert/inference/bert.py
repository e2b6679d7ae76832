"""Encoders of transformers for inference: an HBERT encoder that computes the same, behind the arguments of theirs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput
from transformers.utils.generic import can_return_tuple

from hbert.convert import build
from hbert.convert.families import FAMILIES
from hbert.convert.source import source_of
from hbert.inputs import is_readable
from hbert.modeling import HBertModel
from hbert.patching.encoder import WITHOUT_EFFECT, token_positions

from .encoder import OptimizedHBertModel


class OptimizedBertModel(PreTrainedModel):
    """What a BERT, RoBERTa, XLM-R or DistilBERT encoder of transformers computes in evaluation mode.

    Hidden states under the mask are zeros. There are no attentions, no caches and no masks but [B, N].

    Raises:
        ValueError: the encoder has something that HBERT has not, such as another activation.
    """

    # Whatever the original was told to use: there is one way here.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, source: PreTrainedModel, dtype: str):
        super().__init__(copy.deepcopy(source.config))
        self.encoder = OptimizedHBertModel(_converted(source), dtype)
        self.pooler = copy.deepcopy(getattr(source, "pooler", None))
        if self.pooler is not None:
            self.pooler.to(self.encoder.dtype)
        counts_tokens = FAMILIES[source.config.model_type].first_position is None
        self._padding = source.config.pad_token_id if counts_tokens else None
        self._has_pooler = hasattr(source, "pooler")
        self.eval().requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.encoder.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> ModelOutput:
        """Encode a padded batch [B, N]; arguments as in transformers.

        Raises:
            ValueError: an argument that the packed form has not; a sequence that is too long; in a model that counts
                tokens, such as a RoBERTa, without position_ids, padding ids where the mask keeps them (CPU, eager).
        """
        asked = {name for name, value in others.items() if value is not None and value is not False}
        if unknown := asked - set(WITHOUT_EFFECT):
            raise ValueError(f"an optimized model has no {', '.join(sorted(unknown))}: use the original one")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # Of any dtype, as transformers takes it.
        mask = None if attention_mask is None else attention_mask != 0
        found = self.encoder(
            input_ids,
            mask,
            token_type_ids,
            self._positions(position_ids, input_ids, inputs_embeds, mask),
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        if not self._has_pooler:
            return found
        states = found.last_hidden_state
        pooled = None if self.pooler is None else self.pooler(states)
        return BaseModelOutputWithPoolingAndCrossAttentions(states, pooled, found.hidden_states)

    def _positions(
        self, given: Tensor | None, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Rows of our table of positions, [B, N] or [1, N]: theirs, without the first rows of RoBERTa's."""
        if given is not None:
            return given if self._padding is None else given - (self._padding + 1)
        main = embeds if ids is None else ids
        if main is None or main.dim() < 2:
            return None  # the encoder says what is wrong
        shape, limit = main.shape[:2], self.encoder.config.max_position_embeddings
        if ids is not None and self._padding is not None:
            _check_padding(ids, mask, self._padding)
        positions = token_positions(ids, shape, main.device, limit, self._padding)
        # Padding, which the mask takes out, has position -1.
        return positions.clamp(min=0)


def _converted(source: PreTrainedModel) -> HBertModel:
    try:
        checkpoint = source_of(source.config, source.state_dict())
    except ValueError as error:
        raise ValueError(f"{type(source).__name__} cannot be optimized: {error}") from error
    model = build(checkpoint)[0]
    assert isinstance(model, HBertModel)
    return model


def _check_padding(ids: Tensor, mask: Tensor | None, padding: int) -> None:
    """Checks that the mask takes out all padding ids: the table has no row for them, as the original's has."""
    if not is_readable(ids):
        return
    kept = ids == padding
    if mask is not None and mask.shape == ids.shape:  # else the encoder says what is wrong
        kept &= mask
    if kept.any():
        row, column = kept.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} has the padding id {padding} in column {column}, which attention_mask does not take out: give"
            " the tokenizer's mask"
        )
