"""The encoders that can be read: their names for HBERT's tensors, and their configuration as HBERT's.

Tensors go by the names of ``HBertModel`` and, behind ``head.``, of ``HBertMaskedLMHead``. The three blocks of
``attention.qkv`` go by names of their own, ``attention.self_query``, ``self_key`` and ``self_value``:
checkpoints store them apart, and an additive layer takes two of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from hbert.config import HBertConfig

SELF_BLOCKS = ("self_query", "self_key", "self_value")
_LAYER = re.compile(r"layers\.(\d+)\.")
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
# Fields that mean the same in HBERT, and their values in an encoder that does not have them.
_FIELDS: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "max_position_embeddings": None,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,
    "type_vocab_size": 0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """Encoders with one set of names.

    Attributes:
        prefix: of the encoder in a model with a head.
        modules: HBERT's module -> theirs, ``*`` is the number of the layer; None: the names are the same.
        namespaces: what the names of the encoder's own tensors begin with, behind ``prefix``.
        head: what the names of the masked-LM head begin with; empty: there is none that HBERT has.
        head_bias: second name of the decoder's bias, and with some writers its only one.
        without_place: ending of a name in the encoder -> why HBERT has no place for such a tensor.
        fields: field of HBertConfig -> theirs, where the names differ.
        head_activation: the activation in that head; None: the one of the configuration.
        first_position: row of the table for the first token; None: ``pad_token_id + 1``.
        functions: modules without tensors, as in ``modules``. HBERT has them as one for two, or as numbers;
            they are what :mod:`hbert.patching` calls, and dropout probabilities are read from them.
    """

    prefix: str
    modules: Mapping[str, str] | None
    namespaces: tuple[str, ...]
    head: str = ""
    head_bias: str = ""
    without_place: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    head_activation: str | None = None
    first_position: int | None = 0
    functions: Mapping[str, str] = field(default_factory=dict)

    def path(self, module: str) -> str | None:
        """Returns their name, without ``prefix`` and with ``*`` for the layer, of a module of HBERT.

        None: they have no such module.
        """
        return {**(self.modules or {}), **self.functions}.get(module)

    def name(self, tensor: str) -> str:
        """Returns their name, without ``prefix``, of a tensor of HBERT.

        Raises:
            ValueError: there is no such tensor.
        """
        if self.modules is None:
            return tensor
        layer = _LAYER.match(tensor)
        module, _, leaf = _LAYER.sub("layers.*.", tensor).rpartition(".")
        if module not in self.modules:
            raise ValueError(f"such an encoder has no tensor that could be {tensor}")
        name = f"{self.modules[module]}.{leaf}"
        return name.replace("*", layer[1]) if layer else name

    def skipped_positions(self, config: PreTrainedConfig) -> int:
        """Returns how many rows of the position table stand before that of a first token."""
        if self.first_position is not None:
            return self.first_position
        if config.pad_token_id is None:
            raise ValueError(f"a {config.model_type} model without pad_token_id has no first position")
        return config.pad_token_id + 1

    def hbert_config(self, config: PreTrainedConfig, with_head: bool, tied: bool) -> HBertConfig:
        """Returns the configuration of the HBERT encoder that computes the same.

        For an encoder that is not ours: self-attention in every layer, post-norm and learned positions.

        Raises:
            ValueError: the model has something that HBERT has not.
        """
        if isinstance(config, HBertConfig):
            return config
        activation = self._activation(config, with_head)
        check_encoder(config)
        shared = {name: getattr(config, self.fields.get(name, name), absent) for name, absent in _FIELDS.items()}
        shared["max_position_embeddings"] -= self.skipped_positions(config)
        return HBertConfig(
            **shared,
            hidden_act=activation,
            layer_types="S" * config.num_hidden_layers,
            norm_style="post_ln",
            positions="learned",
            tie_word_embeddings=tied,
        )

    def _activation(self, config: PreTrainedConfig, with_head: bool) -> str:
        name = getattr(config, self.fields.get("hidden_act", "hidden_act"))
        if name not in ACTIVATIONS:
            raise ValueError(f"its activation is {name!r}; HBERT has {', '.join(ACTIVATIONS)}")
        if with_head and self.head_activation not in (None, name):
            raise ValueError(
                f"its activation is {name!r}, but {self.head_activation!r} in its masked-LM head; HBERT has "
                "one for both: convert the encoder without that head"
            )
        return ACTIVATIONS[name]


def check_encoder(config: PreTrainedConfig) -> None:
    """Checks that an encoder attends in both directions, to its own tokens only, and has absolute positions.

    Raises:
        ValueError: it does not.
    """
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("it is a decoder; HBERT attends in both directions and to its own tokens only")
    # No longer a field of these configurations, but in the files of old checkpoints.
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise ValueError(f"its positions are {positions!r}; HBERT has absolute ones")


_BERT_ENCODER = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.*.attention.self_query": "encoder.layer.*.attention.self.query",
    "layers.*.attention.self_key": "encoder.layer.*.attention.self.key",
    "layers.*.attention.self_value": "encoder.layer.*.attention.self.value",
    "layers.*.attention.out": "encoder.layer.*.attention.output.dense",
    "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.ffn.fc1": "encoder.layer.*.intermediate.dense",
    "layers.*.ffn.fc2": "encoder.layer.*.output.dense",
    "layers.*.ffn_norm": "encoder.layer.*.output.LayerNorm",
}
_BERT_FUNCTIONS = {
    "embeddings.dropout": "embeddings.dropout",
    "layers.*.attention.dropout": "encoder.layer.*.attention.self.dropout",
    "layers.*.attention_dropout": "encoder.layer.*.attention.output.dropout",
    "layers.*.ffn.activation": "encoder.layer.*.intermediate.intermediate_act_fn",
    "layers.*.ffn_dropout": "encoder.layer.*.output.dropout",
}
_BERT = Family(
    prefix="bert.",
    modules=_BERT_ENCODER
    | {
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.decoder": "cls.predictions.decoder",
    },
    namespaces=("embeddings.", "encoder."),
    head="cls.predictions.",
    head_bias="cls.predictions.bias",
    functions=_BERT_FUNCTIONS | {"head.activation": "cls.predictions.transform.transform_act_fn"},
)
_ROBERTA = Family(
    prefix="roberta.",
    modules=_BERT_ENCODER
    | {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head.decoder": "lm_head.decoder"},
    namespaces=("embeddings.", "encoder."),
    head="lm_head.",
    head_bias="lm_head.bias",
    head_activation="gelu",
    first_position=None,
    functions=_BERT_FUNCTIONS,
)
_DISTILBERT = Family(
    prefix="distilbert.",
    modules={
        "embeddings.word_embeddings": "embeddings.word_embeddings",
        "embeddings.position_embeddings": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "layers.*.attention.self_query": "transformer.layer.*.attention.q_lin",
        "layers.*.attention.self_key": "transformer.layer.*.attention.k_lin",
        "layers.*.attention.self_value": "transformer.layer.*.attention.v_lin",
        "layers.*.attention.out": "transformer.layer.*.attention.out_lin",
        "layers.*.attention_norm": "transformer.layer.*.sa_layer_norm",
        "layers.*.ffn.fc1": "transformer.layer.*.ffn.lin1",
        "layers.*.ffn.fc2": "transformer.layer.*.ffn.lin2",
        "layers.*.ffn_norm": "transformer.layer.*.output_layer_norm",
        "head.dense": "vocab_transform",
        "head.norm": "vocab_layer_norm",
        "head.decoder": "vocab_projector",
    },
    namespaces=("embeddings.", "transformer."),
    head="vocab_",
    head_bias="vocab_projector.bias",
    fields={
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
    functions={
        "embeddings.dropout": "embeddings.dropout",
        "layers.*.attention.dropout": "transformer.layer.*.attention.dropout",
        "layers.*.ffn.activation": "transformer.layer.*.ffn.activation",
        "layers.*.ffn_dropout": "transformer.layer.*.ffn.dropout",
        "head.activation": "activation",
    },
)
_HBERT = Family(
    prefix="hbert.",
    modules=None,
    namespaces=("embeddings.", "layers.", "norm."),
    head="head.",
    head_bias="head.decoder.bias",
)
# By model_type. MiniLM is a small BERT; XLM-R is RoBERTa with another vocabulary.
FAMILIES = {"bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "distilbert": _DISTILBERT, "hbert": _HBERT}

# State dicts, which come without a configuration, by the code that writes them: the PyTorch notebook of
# https://github.com/wuch15/Fastformer, and the encoder of https://github.com/microsoft/torchscale.
STATE_DICTS = {
    "fastformer": Family(
        prefix="fastformer_model.",
        modules={
            "embeddings.word_embeddings": "word_embedding",
            "embeddings.position_embeddings": "position_embeddings",
            "embeddings.norm": "LayerNorm",
            "layers.*.attention.query": "encoders.*.attention.self.query",
            "layers.*.attention.query_att": "encoders.*.attention.self.query_att",
            "layers.*.attention.key": "encoders.*.attention.self.key",
            "layers.*.attention.key_att": "encoders.*.attention.self.key_att",
            "layers.*.attention.transform": "encoders.*.attention.self.transform",
            "layers.*.attention_norm": "encoders.*.attention.output.LayerNorm",
            "layers.*.ffn.fc1": "encoders.*.intermediate.dense",
            "layers.*.ffn.fc2": "encoders.*.output.dense",
            "layers.*.ffn_norm": "encoders.*.output.LayerNorm",
        },
        namespaces=("encoders.", "position_embeddings.", "LayerNorm."),
        without_place={
            f".attention.output.dense.{leaf}": "HBERT has no projection behind additive attention"
            for leaf in ("weight", "bias")
        },
    ),
    "torchscale": Family(
        prefix="encoder.",
        modules={
            "embeddings.word_embeddings": "embed_tokens",
            "embeddings.position_embeddings": "embed_positions",
            "embeddings.norm": "layernorm_embedding",
            "layers.*.attention.self_query": "layers.*.self_attn.q_proj",
            "layers.*.attention.self_key": "layers.*.self_attn.k_proj",
            "layers.*.attention.self_value": "layers.*.self_attn.v_proj",
            "layers.*.attention.norm": "layers.*.self_attn.inner_attn_ln",
            "layers.*.attention.out": "layers.*.self_attn.out_proj",
            "layers.*.attention_norm": "layers.*.self_attn_layer_norm",
            "layers.*.ffn.fc1": "layers.*.ffn.fc1",
            "layers.*.ffn.norm": "layers.*.ffn.ffn_layernorm",
            "layers.*.ffn.fc2": "layers.*.ffn.fc2",
            "layers.*.ffn_norm": "layers.*.final_layer_norm",
            "norm": "layer_norm",
        },
        namespaces=("embed_", "layernorm_embedding.", "layers.", "layer_norm.", "relative_position."),
        first_position=2,
    ),
}
