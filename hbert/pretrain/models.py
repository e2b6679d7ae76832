"""The models that can be pretrained: HBERT in every layer pattern, and BERT as transformers has it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedConfig, PreTrainedModel

from hbert.config import LETTERS, SIZES, HBertConfig
from hbert.data.masking import IGNORE_INDEX
from hbert.modeling import HBertForMaskedLM

from .recipes import Recipe

BERT = "bert"
DEFAULT_SIZE = "mini"
PRESETS: dict[str, Callable[..., HBertConfig]] = {
    "v1": HBertConfig.v1,
    "v2": HBertConfig.v2,
    "v1c": HBertConfig.v1c,
    "v2c": HBertConfig.v2c,
    "additive": HBertConfig.additive,
    "additive-c": HBertConfig.additive_c,
    "vanilla": HBertConfig.vanilla,
}
_MIN_POSITIONS = 512


def dimensions(size: str) -> dict[str, int]:
    """Returns depth, width and heads of ``tiny``, ``mini``, ``small``, ``base`` or ``LxHxA`` (``6x256x4``).

    Raises:
        ValueError: neither a name nor three positive numbers.
    """
    if size in SIZES:
        return dict(SIZES[size])
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", size):
        raise ValueError(f"unknown size {size!r}; allowed: {', '.join(SIZES)}, or layers x width x heads as in 6x256x4")
    return dict(zip(SIZES["base"], map(int, size.split("x")), strict=True))


def model_config(
    arch: str, size: str, fields: Mapping[str, Any], recipe: Recipe, vocab_size: int, pad_token_id: int = 0
) -> PreTrainedConfig:
    """Returns the configuration of a model; ``fields`` override those of the recipe.

    ``arch``: a preset, letters (A additive, S self-attention), or ``bert``, which takes no model field of the
    recipe but the dropout.

    Raises:
        ValueError: an unknown arch, size or field, or values that do not fit together.
    """
    config_class = BertConfig if arch == BERT else HBertConfig
    check_fields(config_class, fields)
    shape = dimensions(size)
    merged = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "max_position_embeddings": max(_MIN_POSITIONS, recipe.block_size),
        "hidden_dropout_prob": recipe.dropout,
        "attention_probs_dropout_prob": recipe.dropout,
        **shape,
        **({} if arch == BERT else recipe.model),
        **fields,
    }
    return _bert_config(merged) if arch == BERT else hbert_config(arch, merged, others=(BERT,))


def _bert_config(fields: Mapping[str, Any]) -> BertConfig:
    """BERT's configuration, of which a model can be made.

    Raises:
        ValueError: a value that the configuration or the model refuses.
    """
    try:
        config = BertConfig(**{"intermediate_size": 4 * fields["hidden_size"], **fields})
        with torch.device("meta"):
            BertForMaskedLM(config)
    except Exception as error:
        # Half a dozen unrelated types are raised here: transformers checks some fields, torch others, nobody the rest.
        given = ", ".join(f"{name} {value!r}" for name, value in fields.items())
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"there is no {BERT} of {given}: {reason}") from error
    return config


def hbert_config(arch: str, fields: Mapping[str, Any], others: Sequence[str] = ()) -> HBertConfig:
    """Returns the configuration of a preset, or of letters for the layers, with these fields.

    ``others``: further names to list where the arch is unknown.

    Raises:
        ValueError: an unknown arch, or values that do not fit together.
    """
    if "layer_types" in fields:
        raise ValueError("the arch decides layer_types; give their letters as the arch, as in AASAAS")
    if arch in PRESETS:
        return PRESETS[arch]("base", **fields)
    if not arch or set(arch) - set(LETTERS):
        raise ValueError(
            f"unknown arch {arch!r}; allowed: {', '.join([*PRESETS, *others])}, or a letter for each layer "
            "(A additive, S self-attention) as in AASAAS"
        )
    return HBertConfig(layer_types=arch, **fields)


def model_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the model's type and every field of its configuration that is its own."""
    own = {name: getattr(config, name) for name in _own_fields(type(config))}
    return {"model_type": config.model_type, **own}


def _own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    inherited = set(inspect.signature(PreTrainedConfig.__init__).parameters)
    return [n for n in inspect.signature(config_class.__init__).parameters if n not in inherited | {"kwargs"}]


def check_fields(config_class: type[PreTrainedConfig], fields: Mapping[str, Any]) -> None:
    """Checks names of fields.

    Raises:
        ValueError: one that this configuration has not.
    """
    allowed = _own_fields(config_class)
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}; allowed: {', '.join(allowed)}")


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Returns the masked-LM model with random weights, a pure function of (config, seed), in float32."""
    torch.manual_seed(seed)
    if isinstance(config, BertConfig):
        return BertForMaskedLM(config)
    assert isinstance(config, HBertConfig)
    return HBertForMaskedLM(config)


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of parameters, tied ones counted once: all of them, and those of the token embedding."""
    embedding = model.get_input_embeddings()
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "token_embedding": sum(p.numel() for p in embedding.parameters()),
    }


def masked_lm_terms(
    forward: Callable[..., Any], ours: bool, inputs: Mapping[str, Any], labels: Tensor, here: int, num_masked: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs a model on a part of a batch; returns (its share of the batch's mean loss, hits), both scalars.

    The shares of all parts add up to (sum of the losses of all masked tokens) / num_masked.

    Args:
        forward: the model, as it is or wrapped.
        ours: HBERT; else a model of transformers, which computes its own mean loss from all logits.
        labels: int64 [B, N] (or [T], packed), -100 where nothing is to be predicted.
        here: how many tokens are masked in this part.
        num_masked: int64 scalar, how many are in the whole batch.
    """
    if ours:
        output = forward(**inputs, labels=labels, num_masked=num_masked)
        return output.loss, output.num_correct
    output = forward(**inputs, labels=labels)
    masked = labels != IGNORE_INDEX
    hits = (output.logits.detach()[masked].argmax(-1) == labels[masked]).sum()
    # The mean over no token is NaN; the sum over none, and its gradient, is 0.
    loss = output.loss * (here / num_masked) if here else 0.0 * output.logits.sum()
    return loss, hits
