"""HBertModel and its masked-LM head: one forward over a layout, in the conventions of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils.generic import can_return_tuple

from hbert_kernels import masked_lm_loss
from hbert_kernels.nn import ActivationLayerNorm, AddLayerNorm, ConvLayerNorm, HeadScorer, onloaded, weight_says_all

from .config import PRE_NORM_STYLES, HBertConfig
from .embeddings import HBertEmbeddings, sinusoidal_table
from .inputs import build_layout, check_labels, check_masked_positions, check_range, check_token_inputs, per_token
from .layers import Carry, build_layer, stream_of
from .layout import Layout

IGNORE_INDEX = -100


@dataclass
class HBertMaskedLMOutput(ModelOutput):
    """Output of :class:`HBertForMaskedLM`.

    Attributes:
        loss: mean cross-entropy over the masked tokens, a scalar; if labels were given.
        logits: [B, N, V] ([T, V] for packed inputs), zeros where a token is not valid; None in training with
            labels.
        hidden_states, attentions: as in :class:`HBertModel`, if asked for.
        num_masked: int64 scalar, the number of labels that count; if labels were given.
        num_correct: int64 scalar, how many of these the largest logit hits; if labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    num_masked: Tensor | None = None
    num_correct: Tensor | None = None


class HBertPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization of HBERT models.

    ``attn_implementation="sdpa"`` (the default) runs packed tokens through the ops of hbert_kernels;
    ``"eager"`` runs plain torch with masks on [B, N, H], for export.
    """

    config_class = HBertConfig
    base_model_prefix = "hbert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["HBertEmbeddings", "HBertPreNormLayer", "HBertPostNormLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # Linear, Embedding, and every class whose name contains LayerNorm
        if isinstance(module, ConvLayerNorm):
            init.copy_(module.conv_weight, module.initial_conv_weight())
        elif isinstance(module, HeadScorer):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, HBertEmbeddings) and module.position_table is not None:
            init.copy_(module.position_table, sinusoidal_table(*module.position_table.shape))
        elif self.config.init == "magneto" and hasattr(module, "init_gains"):
            _init_xavier(module)


def _init_xavier(linear: Any) -> None:
    """Xavier normal, each of the equal row blocks of the weight as a matrix of its own with its gain."""
    # transformers' initializers look for the mark of a loaded weight, but blocks of it do not carry it.
    if not getattr(linear.weight, "_is_hf_initialized", False):
        blocks = linear.weight.chunk(len(linear.init_gains))
        for block, gain in zip(blocks, linear.init_gains, strict=True):
            init.xavier_normal_(block, gain)


class HBertModel(HBertPreTrainedModel):
    """HBERT encoder without a head.

    Raises:
        ValueError: a field of the configuration was set to what :class:`HBertConfig` does not take.
    """

    def __init__(self, config: HBertConfig):
        config.check()
        super().__init__(config)
        self.embeddings = HBertEmbeddings(config)
        self.layers = nn.ModuleList(build_layer(config, layer_type) for layer_type in config.layer_types)
        pre_norm = config.norm_style in PRE_NORM_STYLES
        self.norm = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pre_norm else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def pack_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Layout, dict[str, Tensor | None]]:
        """The layout of a batch, and its inputs in the token order of that layout.

        For heads that work on tokens: ``layout, tokens = model.pack_inputs(...)``, ``model(**tokens,
        layout=layout)``. Arguments and errors are those of :meth:`forward`.
        """
        weight = self.embeddings.norm.weight
        if weight.dtype == torch.float16 and weight.device.type == "cpu":
            raise TypeError("float16 models run on GPUs only; on a CPU use bfloat16 or float32")
        main = check_token_inputs(input_ids, inputs_embeds, cu_seqlens is not None, self.config.hidden_size)
        dense = self.config._attn_implementation == "eager"
        keep = self.config.output_attentions if output_attentions is None else output_attentions
        layout = build_layout(main, attention_mask, cu_seqlens, max_seqlen, dense, bool(keep))
        inputs = {
            "input_ids": input_ids,
            "token_type_ids": per_token("token_type_ids", token_type_ids, main),
            "position_ids": per_token("position_ids", position_ids, main),
            "inputs_embeds": inputs_embeds,
        }
        return layout, {name: None if t is None else layout.pack(t) for name, t in inputs.items()}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        layout: Layout | None = None,
    ) -> BaseModelOutput:
        """Encode a padded batch [B, N], or packed tokens [T] with ``cu_seqlens``.

        Args:
            input_ids: int64 or int32, [B, N] or [T].
            attention_mask: bool or integer [B, N], nonzero = valid token: left or right padding, holes, empty
                rows. What stands under the mask changes no bit of any output. None: all tokens are valid.
            token_type_ids: integer, shape of input_ids or [1, N]; ignored if ``type_vocab_size`` is 0. Default 0.
            position_ids: integer, shape of input_ids or [1, N]; default: the rank of a token among the valid ones of
                its sequence.
            inputs_embeds: floating [B, N, H] or [T, H], instead of input_ids.
            output_hidden_states: return the residual stream before each layer, and the final output.
            output_attentions: return what each layer attended to: [B, h, N, N] in a self-attention layer,
                [B, h, 2, N] in an additive one, the pooling of its global query and of its global key.
                Such a call runs plain torch, as with ``attn_implementation="eager"``; not for packed inputs.
            cu_seqlens: int32 [B+1], starts of the sequences in packed inputs; tokens behind the last one are
                dead.
            max_seqlen: length of the longest sequence; only with cu_seqlens.
            layout: from :meth:`pack_inputs`, if the inputs are in its token order already. Then the outputs
                stay in it, and attention_mask and cu_seqlens have no meaning.

        Returns:
            last_hidden_state [B, N, H] ([T, H] for packed inputs) with zeros where a token is not valid, and
            if asked for hidden_states, ``num_hidden_layers + 1`` such tensors, and attentions, one a layer.

        Raises:
            TypeError: a wrong dtype; a float16 model on a CPU.
            ValueError: wrong shapes; ids out of range (CPU, eager); a sequence longer than
                ``max_position_embeddings``.
        """
        keep_states = output_hidden_states
        if keep_states is None:
            keep_states = self.config.output_hidden_states
        if layout is not None:
            x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, layout)
            outputs = self._encode(x, layout, keep_states)
        else:
            layout, tokens = self.pack_inputs(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                cu_seqlens,
                max_seqlen,
                output_attentions,
            )
            x = self.embeddings(**tokens, layout=layout)
            outputs = tuple(layout.unpack(state) for state in self._encode(x, layout, keep_states))
        return BaseModelOutput(
            last_hidden_state=outputs[-1],
            hidden_states=outputs if keep_states else None,
            attentions=None if layout.attentions is None else tuple(layout.attentions),
        )

    def _encode(self, x: Tensor, layout: Layout, keep_states: bool | None) -> tuple[Tensor, ...]:
        """The final output; with ``keep_states``, before it the residual stream in front of each layer."""
        carry: Carry = (x, None)
        states: list[Tensor] = []
        for layer in self.layers:
            if keep_states:
                states.append(stream_of(carry))
            carry = layer(*carry, layout)
        return *states, carry[0] if self.norm is None else self.norm(*carry)[0]


class HBertHeadModel(HBertPreTrainedModel):
    """An encoder, ``hbert``, under a head that works on its tokens."""

    def __init__(self, config: HBertConfig):
        super().__init__(config)
        self.hbert = HBertModel(config)

    def encode(
        self, inputs: dict[str, Any], output_hidden_states: bool | None, output_attentions: bool | None
    ) -> tuple[Layout, Tensor, BaseModelOutput]:
        """What the encoder makes of a batch.

        Args:
            inputs: the arguments of :meth:`HBertModel.pack_inputs`.

        Returns:
            The layout; the final hidden states in its token order; and hidden_states and attentions, in the
            shapes that :meth:`HBertModel.forward` gives.
        """
        layout, tokens = self.hbert.pack_inputs(**inputs, output_attentions=output_attentions)
        encoded = self.hbert(**tokens, output_hidden_states=output_hidden_states, layout=layout, return_dict=True)
        if encoded.hidden_states is not None:
            encoded.hidden_states = tuple(layout.unpack(state) for state in encoded.hidden_states)
        return layout, encoded.last_hidden_state, encoded


class HBertMaskedLMHead(nn.Module):
    """``decoder(LN(act(dense(x))))``: [..., H] -> [..., V]; the decoder is tied to the token embedding."""

    def __init__(self, config: HBertConfig):
        super().__init__()
        hidden = config.hidden_size
        self.dense = nn.Linear(hidden, hidden)
        self.norm = ActivationLayerNorm(hidden, eps=config.layer_norm_eps, activation=config.hidden_act)
        self.decoder = nn.Linear(hidden, config.vocab_size)

    def transform(self, x: Tensor) -> Tensor:
        """What the decoder sees: [..., H] -> [..., H]."""
        return self.norm(self.dense(x))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> logits [..., V]."""
        return self.decoder(self.transform(x))


def masked_rows(hidden: Tensor, labels: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows of hidden states [T, H] and labels [T] that count; ``masked`` int64 [M] says which, if known.

    While compiling all of them, unless it is known: how many count must not become a shape.
    """
    if masked is None:
        if torch.compiler.is_compiling():
            return hidden, labels
        masked = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return hidden.index_select(0, masked), labels[masked]


def _loss_of_logits(logits: Tensor, labels: Tensor, divisor: Tensor | int) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of logits [M, V] over ``divisor``, in float32 or wider, and the number of hits."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / divisor, ((logits.argmax(-1) == labels) & (labels != IGNORE_INDEX)).sum()


class HBertForMaskedLM(HBertHeadModel):
    """HBERT with a masked-language-model head."""

    _tied_weights_keys = {"head.decoder.weight": "hbert.embeddings.word_embeddings.weight"}
    # The loss is divided by the number of masked tokens of this call, or by num_masked.
    accepts_loss_kwargs = False

    def __init__(self, config: HBertConfig):
        super().__init__(config)
        self.head = HBertMaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder."""
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder."""
        self.head.decoder = value

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
        num_masked: Tensor | int | None = None,
        masked_positions: Tensor | None = None,
    ) -> HBertMaskedLMOutput:
        """Predict masked tokens; arguments as in :meth:`HBertModel.forward`, and:

        Args:
            labels: int64, shape of input_ids: the true id of each masked token, -100 elsewhere. Labels of
                tokens that are not valid do not count. In eager mode the head runs on the masked tokens only.
            num_masked: what the summed loss is divided by: the number of masked tokens of the *global* batch,
                when gradients are accumulated or summed over processes. Default: the number in this call.
            masked_positions: int64 [M], where in the flattened labels those that count stand. Given, they are
                not read from the labels, which would wait for a GPU. Not together with attention_mask.

        Raises:
            TypeError, ValueError: as in :meth:`HBertModel.forward`; labels of a wrong dtype or shape, or not
                in [0, V); masked_positions that do not fit.
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
        loss = num_correct = counted = logits = None
        if labels is not None:
            check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds)
            check_masked_positions(masked_positions, labels, attention_mask)
            labels = layout.pack(labels, IGNORE_INDEX)
            check_range("labels", labels, self.config.vocab_size, IGNORE_INDEX)
            loss, counted, num_correct = self.masked_loss(hidden, labels, masked_positions, num_masked)
        if labels is None or not self.training:
            logits = layout.unpack(self.head(hidden))
        return HBertMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            num_masked=counted,
            num_correct=num_correct,
        )

    def masked_loss(
        self, hidden: Tensor, labels: Tensor, masked: Tensor | None = None, divisor: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, number of labels that count, and number of hits, of the encoder's hidden states.

        Args:
            hidden: [..., H].
            labels: int64 [...], -100 where there is none.
            masked: the flat positions with a label; None: all are looked at.
            divisor: of the summed loss; None: the number of labels that count.
        """
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        hidden, labels = masked_rows(hidden, labels, masked)
        hidden, decoder = self.head.transform(hidden), self.head.decoder
        counted = (labels != IGNORE_INDEX).sum()
        if not weight_says_all(decoder, nn.Linear):
            # The op reads the weight, which would go around whatever stands in for a linear layer, and hooks.
            shared = counted.clamp(min=1) if divisor is None else divisor
            loss, num_correct = _loss_of_logits(decoder(hidden), labels, shared)
        else:
            with onloaded(decoder):
                loss, num_correct = masked_lm_loss(
                    hidden, decoder.weight, decoder.bias, labels, ignore_index=IGNORE_INDEX, num_masked=divisor
                )
        return loss, counted, num_correct


# exist_ok: reloading the module (notebooks, tests) registers again.
AutoModel.register(HBertConfig, HBertModel, exist_ok=True)
AutoModelForMaskedLM.register(HBertConfig, HBertForMaskedLM, exist_ok=True)
# They build on this module: whichever model is asked for, all are registered.
import_module("hbert.heads")
