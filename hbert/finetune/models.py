"""Checkpoints to fine-tune, predict or embed with, ours or those of transformers, and their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

import hbert.heads  # noqa: F401  registers HBERT with the Auto classes
from hbert.errors import HbertError
from hbert.evaluate.checkpoint import from_checkpoint, pretrained_tokenizer
from hbert.evaluate.held_out import max_positions
from hbert.precision import device
from hbert.pretrain.models import check_fields

from .examples import LabelSet

# A pooler is the head's own layer, though it stands inside the encoder of BERT.
_POOLER = "pooler."
# Constants that earlier versions of transformers saved with the weights.
_CONSTANTS = (".position_ids", ".token_type_ids")


def load_new_classifier(name: str, labels: LabelSet, fields: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """Returns a checkpoint with a classification head for these labels, in float32 on the CPU.

    Args:
        name: a folder or a hub name; a head that it was saved with is kept if it is for the same labels in the
            same order, else the whole of it is new.
        fields: of the configuration, in place of the checkpoint's.
        seed: of the weights of a new head.

    Raises:
        HbertError: no such model, an architecture without such a head, or weights that are missing,
            incomplete, of another shape or of another architecture. ValueError: an unknown field or a wrong
            value of one.
    """
    saved = _config(name, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "sequence classification head")
    config = _with_fields(saved, labels, fields)
    torch.manual_seed(seed)
    model, info = _weights(name, AutoModelForSequenceClassification, config, ignore_mismatched_sizes=True)
    _check_encoder(name, model, info)
    if label_names(saved) != list(labels.names) and _has_saved_head(model, info):
        fresh = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        fresh.base_model.load_state_dict(model.base_model.state_dict())
        return fresh
    return model


def load_classifier(name: str, where: torch.device | None = None) -> PreTrainedModel:
    """Returns a fine-tuned sequence classifier in float32 and evaluation mode.

    Args:
        where: the device; None: the one there is.

    Raises:
        HbertError: as in :func:`load_new_classifier`, or it has no trained head.
    """
    config = _config(name, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "sequence classification head")
    several = config.problem_type == "multi_label_classification"
    if config.problem_type == "regression" or (not several and len(label_names(config)) < 2):
        raise HbertError(f"{name!r} predicts a number, not labels")
    model, info = _weights(name, AutoModelForSequenceClassification, config)
    _check_encoder(name, model, info)
    if missing := sorted(info["missing_keys"]):
        raise HbertError(
            f"{name!r} has no trained classification head ({missing[0]} is missing): hbert finetune makes one"
        )
    return _ready(model, where)


def load_encoder(name: str, where: torch.device | None = None) -> PreTrainedModel:
    """Returns the encoder of any checkpoint, in float32 and evaluation mode.

    Args:
        where: the device; None: the one there is.

    Raises:
        HbertError: no such model, an encoder-decoder, or its weights are missing, incomplete or of another
            architecture.
    """
    config = _config(name, MODEL_MAPPING, "encoder")
    if config.is_encoder_decoder:
        raise HbertError(f"{name!r} is an encoder-decoder ({config.model_type}); embed takes encoders")
    model, info = _weights(name, AutoModel, config)
    _check_encoder(name, model, info)
    return _ready(model, where)


def load_text_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Returns the checkpoint's tokenizer.

    Raises:
        HbertError: there is none, it has no padding token, or it has ids that the model has no embedding for.
    """
    tokenizer = pretrained_tokenizer(name)
    if tokenizer.pad_token_id is None:
        raise HbertError(f"the tokenizer of {name!r} has no padding token")
    embeddings: Any = model.get_input_embeddings()
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings.num_embeddings:
        raise HbertError(
            f"the vocabulary does not match: the tokenizer of {name!r} has ids up to {largest:,}, but the "
            f"model has {embeddings.num_embeddings:,} token embeddings"
        )
    return tokenizer


def text_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None, pair: bool) -> int:
    """Returns the tokens that texts are truncated to: what was asked for, else all that the model reads.

    Raises:
        ValueError: more than the model has positions, or no more than the special tokens take.
    """
    limit = max_positions(model)
    if asked is None:
        return min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
    if limit is not None and asked > limit:
        raise ValueError(f"max_length is {asked}; the model has {limit} positions")
    smallest = tokenizer.num_special_tokens_to_add(pair) + (2 if pair else 1)
    if asked < smallest:
        raise ValueError(f"max_length is {asked}; with the special tokens it must be at least {smallest}")
    return asked


def label_names(config: PreTrainedConfig) -> list[str]:
    """The labels of a classifier in the order of its outputs."""
    names: Mapping[Any, str] = config.id2label or {}
    return [names[number] for number in sorted(names)]


def _ready(model: PreTrainedModel, where: torch.device | None) -> PreTrainedModel:
    module: torch.nn.Module = model
    module.to(where or device()).eval()
    return model


def _config(name: str, architectures: Mapping[Any, Any], what: str) -> PreTrainedConfig:
    config = from_checkpoint(name, AutoConfig.from_pretrained)
    if type(config) not in architectures:
        raise HbertError(f"{name!r} is a {config.model_type} model: that has no {what}")
    return config


def _with_fields(config: PreTrainedConfig, labels: LabelSet, fields: Mapping[str, Any]) -> PreTrainedConfig:
    check_fields(type(config), fields)
    settings = {**config.to_dict(), **fields}
    settings["id2label"] = dict(enumerate(labels.names))
    settings["label2id"] = {label: number for number, label in enumerate(labels.names)}
    settings["problem_type"] = f"{'multi' if labels.multi else 'single'}_label_classification"
    for derived in ("num_labels", "model_type", "transformers_version"):
        settings.pop(derived, None)
    return type(config)(**settings)


def _weights(
    name: str, auto_class: Any, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Sequence[Any]]]:
    loader: Callable[..., Any] = auto_class.from_pretrained
    return from_checkpoint(name, loader, config=config, dtype=torch.float32, output_loading_info=True, **options)


def _check_encoder(name: str, model: PreTrainedModel, info: Mapping[str, Sequence[Any]]) -> None:
    """Checks that only what belongs to a head is new, and that only that is left over."""
    for keys, what in ((info["missing_keys"], "are missing"), (info["unexpected_keys"], "have no place")):
        if wrong := sorted(key for key in keys if _is_of_encoder(key, model)):
            raise HbertError(
                f"{name!r}: the weights are incomplete or of another architecture ({len(wrong)} tensors {what}, "
                f"such as {wrong[0]})"
            )
    encoder = f"{model.base_model_prefix}."
    if wrong := sorted(entry[0] for entry in info["mismatched_keys"] if entry[0].startswith(encoder)):
        raise HbertError(
            f"{name!r}: {len(wrong)} tensors have another shape than its configuration says, such as {wrong[0]}"
        )


def _is_of_encoder(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor of a checkpoint or of the model is the encoder's, and neither of its pooler nor a constant."""
    inner = key.removeprefix(f"{model.base_model_prefix}.")
    if inner.startswith(_POOLER) or inner.endswith(_CONSTANTS):
        return False
    # What an encoder alone has saved is without the prefix. An absent norm of ours is an attribute that is None.
    return inner != key or hasattr(model.base_model, key.split(".")[0])


def _has_saved_head(model: PreTrainedModel, info: Mapping[str, Sequence[Any]]) -> bool:
    new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    encoder = f"{model.base_model_prefix}."
    return any(not key.startswith(encoder) and key not in new for key in model.state_dict())
