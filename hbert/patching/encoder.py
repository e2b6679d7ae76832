"""The packed forward of an encoder of transformers: its own modules, on tokens [T, ...] without padding."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput

from hbert.convert.families import Family
from hbert.inputs import is_readable
from hbert.layout import PackedLayout

from .parts import add_norm, getter, identity, layers_of

Inputs = Mapping[str, Any]
Forward = Callable[..., Any]
# Arguments that change nothing in an encoder.
WITHOUT_EFFECT = ("use_cache", "num_items_in_batch")
_UNDERSTOOD = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "output_hidden_states",
    "return_dict",
    *WITHOUT_EFFECT,
)


def has_patch(module: nn.Module) -> bool:
    """Whether the class of a module is one that patching made, or a subclass of such a one."""
    return hasattr(type(module), "_hbert_original")


def arguments_of(original: Forward) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """What gives the arguments of a call by name, those in ``**kwargs`` too.

    Raises:
        TypeError: by that function, for a call that the original forward does not take.
    """
    signature = inspect.signature(original)
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            raise TypeError(f"{type(module).__name__} takes {', '.join(names)}, each once")
        return {**dict(zip(names, args, strict=False)), **kwargs}

    return arguments


def embeddings_forward(family: Family, original: Forward) -> Forward:
    """The forward of the embeddings: packed where a layout comes along."""
    words, positions, types, norm, dropout = (
        getter(family, f"embeddings.{name}", "embeddings.")
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "norm", "dropout")
    )

    def forward(self: nn.Module, *args: Any, layout: PackedLayout | None = None, **kwargs: Any) -> Tensor:
        if layout is None:
            return original(self, *args, **kwargs)
        tokens, position_ids = kwargs, kwargs["position_ids"]
        x = tokens["inputs_embeds"] if tokens["input_ids"] is None else words(self)(tokens["input_ids"])
        table = types(self)
        if table is not None:
            token_types = tokens["token_type_ids"]
            x = x + table(torch.zeros_like(position_ids) if token_types is None else token_types)
        return dropout(self)(add_norm(norm(self), x, positions(self)(position_ids)))

    return forward


def layer_forward(family: Family, original: Forward) -> Forward:
    """The forward of a layer: packed where a layout comes along.

    Then its modules above the linear ones are not called.
    """

    def within(name: str, absent: Any = None) -> Callable[[nn.Module], Any]:
        return getter(family, f"layers.*.{name}", "layers.*.", absent)

    blocks = [within(f"attention.self_{name}") for name in ("query", "key", "value")]
    attention_dropout, out = within("attention.dropout"), within("attention.out")
    dropout, norm = within("attention_dropout", identity), within("attention_norm")
    fc1, activation, fc2 = within("ffn.fc1"), within("ffn.activation"), within("ffn.fc2")
    ffn_dropout, ffn_norm = within("ffn_dropout", identity), within("ffn_norm")

    def forward(
        self: nn.Module, x: Any, *args: Any, layout: PackedLayout | None = None, num_heads: int = 0, **kwargs: Any
    ) -> Tensor:
        if layout is None:
            return original(self, x, *args, **kwargs)
        qkv = torch.cat([block(self)(x) for block in blocks], dim=-1)
        probabilities = attention_dropout(self)
        heads = layout.attend(qkv, num_heads, probabilities.p if probabilities.training else 0.0)
        y = add_norm(norm(self), x, dropout(self)(out(self)(heads)))
        inner = activation(self)(fc1(self)(y))
        return add_norm(ffn_norm(self), y, ffn_dropout(self)(fc2(self)(inner)))

    return forward


def encoder_forward(family: Family, original: Forward) -> Forward:
    """The forward of an encoder: packed, or the original where a call asks for what is not packed."""
    arguments, layers = arguments_of(original), layers_of(family)

    def encode(self: Any, tokens: Inputs, layout: PackedLayout, keep: bool) -> list[Tensor]:
        """The final output; with ``keep``, before it that of the embeddings and of all other layers."""
        x, states = self.embeddings(**tokens, layout=layout), []
        for layer in layers(self):
            if keep:
                states.append(x)
            x = layer(x, layout=layout, num_heads=self.config.num_attention_heads)
        return [*states, x]

    def forward(self: Any, *args: Any, layout: PackedLayout | None = None, **kwargs: Any) -> Any:
        inputs = arguments(self, args, kwargs)
        keep = wants_states(self, inputs)
        if layout is not None:
            tokens = {name: value for name, value in inputs.items() if name != "output_hidden_states"}
            states = encode(self, tokens, layout, keep)
            return BaseModelOutput(states[-1], tuple(states) if keep else None)
        if reason := obstacle(self, family, inputs):
            tell(self, reason)
            return original(self, *args, **kwargs)
        layout, tokens = pack_inputs(self, family, inputs)
        states = [layout.unpack(state) for state in encode(self, tokens, layout, keep)]
        return in_asked_form(self, inputs, _output(self, states, keep))

    return forward


def wants_states(encoder: Any, inputs: Inputs) -> bool:
    """Whether the call or else the configuration asks for hidden states."""
    asked = inputs.get("output_hidden_states")
    return bool(encoder.config.output_hidden_states if asked is None else asked)


def in_asked_form(model: Any, inputs: Inputs, output: Any) -> Any:
    """The output, or a tuple of it where the call or else the configuration says so."""
    asked = inputs.get("return_dict")
    return output if (model.config.return_dict if asked is None else asked) else output.to_tuple()


def _output(encoder: Any, states: list[Tensor], keep: bool) -> ModelOutput:
    hidden_states = tuple(states) if keep else None
    if not hasattr(encoder, "pooler"):
        return BaseModelOutput(states[-1], hidden_states)
    pooled = None if encoder.pooler is None else encoder.pooler(states[-1])
    return BaseModelOutputWithPoolingAndCrossAttentions(states[-1], pooled, hidden_states)


def obstacle(encoder: Any, family: Family, inputs: Inputs) -> str | None:
    """Why a call has to run the original forward; None: it can run packed."""
    config = encoder.config
    for name, value in inputs.items():
        if name not in _UNDERSTOOD and value is not None and value is not False:
            return f"the packed forward has no {name}"
    if config.output_attentions and "output_attentions" not in inputs:
        return "the packed forward has no output_attentions"
    if getattr(config, "is_causal", False):
        return "its attention is causal"
    if not isinstance(inputs.get("output_hidden_states"), bool | None):
        return "output_hidden_states names some of them"
    if not all(has_patch(module) for module in (encoder.embeddings, *layers_of(family)(encoder))):
        return "a layer was put in after patching"
    return _unusual_tensors(encoder, inputs)


def _unusual_tensors(encoder: Any, inputs: Inputs) -> str | None:
    if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
        return "not exactly one of input_ids and inputs_embeds"
    main = main_input(inputs)
    if main.dim() != (3 if main.is_floating_point() else 2):
        return f"its inputs have {main.dim()} dimensions"
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != main.shape[:2]:
        return f"attention_mask is {list(mask.shape)}, and not [B, N] = {list(main.shape[:2])}"
    if main.device.type == "cpu" and _working_dtype(encoder) == torch.float16:
        return "float16 on a CPU"
    return None


def _working_dtype(encoder: Any) -> torch.dtype:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return encoder.dtype


def main_input(inputs: Inputs) -> Tensor:
    """The ids [B, N], or the embeddings [B, N, H] that stand for them."""
    ids = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids is None else ids


def tell(model: nn.Module, reason: str) -> None:
    """Warns that a call is not packed; Python shows the same warning once."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"{type(model).__name__} runs its original forward, without packing: {reason}", stacklevel=5)


def pack_inputs(encoder: Any, family: Family, inputs: Inputs) -> tuple[PackedLayout, dict[str, Tensor | None]]:
    """The layout of a batch, and its inputs in the token order of that layout.

    Raises:
        ValueError: a sequence is longer than there are positions.
    """
    ids, main = inputs.get("input_ids"), main_input(inputs)
    shape, device = main.shape[:2], main.device
    mask = inputs.get("attention_mask")
    layout = PackedLayout.from_mask(None if mask is None else mask.to(device, torch.bool), shape, device)
    positions = inputs.get("position_ids")
    if positions is None:
        positions = _positions(encoder, family, ids, shape, device)
    types = inputs.get("token_type_ids")
    tokens = {
        "input_ids": ids,
        "inputs_embeds": inputs.get("inputs_embeds"),
        "position_ids": positions.expand(shape),
        "token_type_ids": None if types is None else types.expand(shape),
    }
    return layout, {name: None if t is None else layout.pack(t) for name, t in tokens.items()}


def _positions(encoder: Any, family: Family, ids: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Row of the position table of each token, [B, N] or [1, N]."""
    table = getter(family, "embeddings.position_embeddings")(encoder)
    counts_tokens = family.first_position is None
    first = table.padding_idx + 1 if family.first_position is None else family.first_position
    padding = table.padding_idx if counts_tokens else None
    return first + token_positions(ids, shape, device, table.num_embeddings - first, padding)


def token_positions(
    ids: Tensor | None, shape: torch.Size, device: torch.device, limit: int, padding: int | None
) -> Tensor:
    """Position of each token, [B, N] or [1, N], as transformers counts them.

    BERT and DistilBERT count columns, padding too. RoBERTa counts the tokens that are not ``padding``, its
    padding id, which has position -1; without ids it counts columns.

    Raises:
        ValueError: there are more of what is counted than ``limit`` (tokens: on the CPU, eager).
    """
    if padding is not None and ids is not None:
        real = (ids != padding).long()
        if is_readable(ids) and ids.numel() > 0:
            _check_length(int(real.sum(1).max()), limit)
        return real.cumsum(1) * real - 1
    _check_length(shape[1], limit)
    return torch.arange(shape[1], device=device)[None]


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(f"sequence length {length} exceeds the {limit} positions")
