"""The heads of classification, tagging and extractive question answering, as transformers has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from .config import HBertConfig
from .inputs import check_labels, check_range
from .modeling import IGNORE_INDEX, HBertHeadModel


def _dropout(config: HBertConfig) -> nn.Dropout:
    given = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if given is None else given)


def _num_labels(config: PreTrainedConfig) -> int:
    count = config.num_labels
    assert count is not None
    return count


class HBertClassificationHead(nn.Module):
    """``out(tanh(dense(x)))``, with dropout in front of both: [B, H] -> [B, num_labels]."""

    def __init__(self, config: HBertConfig):
        super().__init__()
        self.dropout = _dropout(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, _num_labels(config))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H] -> [B, num_labels]."""
        return self.out(self.dropout(self.dense(self.dropout(x)).tanh()))


class HBertForSequenceClassification(HBertHeadModel):
    """HBERT with a head on each sequence's pooled hidden state: classification or regression.

    ``config.classifier_pooling`` says what is pooled: the mean of all tokens, or the first one.
    """

    def __init__(self, config: HBertConfig):
        super().__init__(config)
        self.classifier = HBertClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> SequenceClassifierOutput:
        """Classify sequences; arguments as in :meth:`HBertModel.forward`, and:

        Args:
            labels: int64 [B], the class of each sequence; floating [B, num_labels], 0 or 1 for each label
                (multi-label); or floating [B] or [B, num_labels], targets of a regression.
                ``config.problem_type`` decides; if it is None, num_labels and the dtype do, as in transformers.

        Returns:
            logits [B, num_labels], and with labels the mean loss: cross-entropy, binary cross-entropy or
            squared error.

        Raises:
            TypeError, ValueError: as in :meth:`HBertModel.forward`; another number of labels than of
                sequences, or a class out of range.
        """
        layout, hidden, encoded = self.encode(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
                "cu_seqlens": cu_seqlens,
                "max_seqlen": max_seqlen,
            },
            output_hidden_states,
            output_attentions,
        )
        pool = layout.mean if self.config.classifier_pooling == "mean" else layout.first
        logits = self.classifier(pool(hidden))
        return SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.dim() == 0 or labels.shape[0] != logits.shape[0]:
            raise ValueError(f"{logits.shape[0]} sequences, but labels have shape {tuple(labels.shape)}")
        classes = self.config.problem_type in (None, "single_label_classification")
        if classes and _num_labels(self.config) > 1 and not labels.is_floating_point():
            check_range("labels", labels, _num_labels(self.config), IGNORE_INDEX)
        several = self.config.problem_type == "regression" and _num_labels(self.config) > 1
        if several and labels.shape != logits.shape:
            raise ValueError(
                f"{_num_labels(self.config)} numbers a sequence, but labels have shape {tuple(labels.shape)}"
            )
        return self.loss_function(labels=labels, pooled_logits=_wide(logits), config=self.config)


class HBertForTokenClassification(HBertHeadModel):
    """HBERT with a linear head on each token."""

    def __init__(self, config: HBertConfig):
        super().__init__(config)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, _num_labels(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> TokenClassifierOutput:
        """Classify tokens; arguments as in :meth:`HBertModel.forward`, and:

        Args:
            labels: int64, shape of input_ids: the class of each token, -100 where none counts.

        Returns:
            logits [B, N, num_labels] ([T, num_labels] for packed inputs), zeros where a token is not valid;
            with labels the mean cross-entropy over the tokens that count.

        Raises:
            TypeError, ValueError: as in :meth:`HBertModel.forward`; labels of a wrong dtype or shape, or out
                of range.
        """
        layout, hidden, encoded = self.encode(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
                "cu_seqlens": cu_seqlens,
                "max_seqlen": max_seqlen,
            },
            output_hidden_states,
            output_attentions,
        )
        logits, loss = self.classifier(self.dropout(hidden)), None
        if labels is not None:
            check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds)
            labels = layout.pack(labels, IGNORE_INDEX)
            check_range("labels", labels, _num_labels(self.config), IGNORE_INDEX)
            loss = self.loss_function(logits=logits, labels=labels, config=self.config)
        return TokenClassifierOutput(
            loss=loss, logits=layout.unpack(logits), hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


class HBertForQuestionAnswering(HBertHeadModel):
    """HBERT with a linear head for the first and the last token of an answer."""

    def __init__(self, config: HBertConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Find answers; arguments as in :meth:`HBertModel.forward` for padded inputs, and:

        Args:
            start_positions, end_positions: int64 [B], the columns of the first and the last token of the
                answer; N or above: the sequence does not count.

        Returns:
            start_logits and end_logits [B, N], the lowest finite number where a token is not valid; with both
            positions the mean of their cross-entropies.

        Raises:
            TypeError, ValueError: as in :meth:`HBertModel.forward`; only one of the positions, or a wrong
                number of them.
        """
        positions = start_positions, end_positions
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions must be given together")
        layout, hidden, encoded = self.encode(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
            },
            output_hidden_states,
            output_attentions,
        )
        both = layout.unpack(self.qa_outputs(hidden)).unbind(-1)
        start, end = (_hide_padding(logits, attention_mask) for logits in both)
        return QuestionAnsweringModelOutput(
            loss=None if start_positions is None else self._loss(start, end, *positions),
            start_logits=start,
            end_logits=end,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _loss(self, start: Tensor, end: Tensor, *positions: Tensor | None) -> Tensor:
        for logits, given in zip((start, end), positions, strict=True):
            assert given is not None
            _check_positions(given, logits)
        return self.loss_function(_wide(start), _wide(end), *positions)


def _check_positions(positions: Tensor, logits: Tensor) -> None:
    count, length = logits.shape
    if positions.shape != (count,):
        raise ValueError(f"{count} sequences, but positions have shape {tuple(positions.shape)}")
    if torch.compiler.is_compiling() or positions.device.type != "cpu" or not length:
        return
    inside = positions.clamp(0, length - 1).long()[:, None]
    hidden = (logits.gather(1, inside).squeeze(1) == torch.finfo(logits.dtype).min) & (positions < length)
    if hidden.any():
        row = int(hidden.nonzero()[0])
        raise ValueError(f"position {int(positions[row])} of sequence {row} is padding, which is no answer")


def _wide(logits: Tensor) -> Tensor:
    """``logits`` in the precision of a loss, float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _hide_padding(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``logits`` [B, N] that no softmax over a sequence sees where its token is not valid."""
    if attention_mask is None:
        return logits
    return logits.masked_fill(attention_mask == 0, torch.finfo(logits.dtype).min)


# exist_ok: reloading the module (notebooks, tests) registers again.
AutoModelForSequenceClassification.register(HBertConfig, HBertForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HBertConfig, HBertForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(HBertConfig, HBertForQuestionAnswering, exist_ok=True)
