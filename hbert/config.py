"""The configuration of HBERT encoders and its presets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import RequirementError


def _require_transformers() -> None:
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        raise RequirementError("hbert's models need transformers >= 5.0; it is not installed") from None
    if int(installed.split(".")[0]) < 5:
        raise RequirementError(f"hbert's models need transformers >= 5.0; installed is {installed}")


_require_transformers()

# Behind the check: older versions lack the name, and the message above says more.
from transformers import AutoConfig, PreTrainedConfig  # noqa: E402

ADDITIVE = "linear_attention"
SELF = "full_attention"
LETTERS = {"A": ADDITIVE, "S": SELF}
NORM_STYLES = ("sub_ln", "post_ln", "pre_ln", "merge")
PRE_NORM_STYLES = ("sub_ln", "pre_ln")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
POSITIONS = ("sinusoidal", "learned")
INITS = ("normal", "magneto")
SCORERS = ("dense", "per_head")
POOLINGS = ("mean", "cls")
CONV_KERNEL_SIZES = (0, 3, 5)
CONV_PLACEMENTS = ("input", "branch")
SIZES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2},
    "mini": {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4},
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
}


class HBertConfig(PreTrainedConfig):
    """Configuration of an HBERT encoder (HybridBERT, Srinivasagan & Ostermann, NAACL SRW 2024).

    Args:
        vocab_size: V, number of token ids.
        hidden_size: H, width of the residual stream; a multiple of ``num_attention_heads``.
        num_hidden_layers: number of layers; default: the length of ``layer_types``, or 12.
        num_attention_heads: h, heads of both kinds of attention.
        intermediate_size: width of the feed-forward blocks; default 4 H.
        layer_types: one entry for each layer, ``"linear_attention"`` (additive attention, A) or
            ``"full_attention"`` (self-attention, S); or the same as letters, ``"AASAAS"``. Default: (A, S)
            repeated, which is HBERT-v1.
        norm_style: ``"sub_ln"`` (Magneto, arXiv 2210.06423), ``"pre_ln"``, ``"post_ln"`` (BERT), or
            ``"merge"`` (the layout that the sizes of the authors' checkpoints prove: concatenation, LN of
            width 2H, linear 2H -> H, post-norm).
        hidden_act: ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"relu"``.
        hidden_dropout_prob: dropout after the embeddings and on every branch, before it joins the residual
            stream.
        attention_probs_dropout_prob: dropout on the attention probabilities of S layers (A layers have none).
        classifier_dropout: dropout of classification heads; None: ``hidden_dropout_prob``.
        classifier_pooling: what sequence classification reads: ``"mean"`` of the final hidden states of all
            tokens, or that of the first one, ``"cls"``. Masked-LM pretraining trains no token to stand for
            its sequence, so the mean is the default.
        positions: ``"sinusoidal"`` (a fixed table) or ``"learned"``.
        max_position_embeddings: length of the position table, the longest sequence that is accepted.
        type_vocab_size: number of token types; 0: no table, ``token_type_ids`` are ignored.
        init: ``"normal"`` (N(0, initializer_range), zero biases) or ``"magneto"`` (Xavier normal with gain
            sqrt(ln 2N) on value, output, transform and feed-forward weights, gain 1 on queries and keys).
        initializer_range: standard deviation of ``"normal"``, and of embeddings and heads in both.
        layer_norm_eps: added to the variance in every LayerNorm. BERT's 1e-12, and not the 1e-5 that is
            common with sub-layer norm: the inner norm of an A layer sees the product of a query with two
            pooled vectors, whose variance is 1e-7 in an untrained base model (512 tokens, learned positions).
            An eps above it would switch that norm off.
        scorer: scores of additive attention, ``"dense"`` (H -> h, the official Fastformer code) or
            ``"per_head"`` (each head scores its own slice, the Fastformer paper).
        conv_kernel_size: taps of the short convolution on the normalized input of A layers, 3 or 5; 0: none.
            Needs a norm before the attention: ``"sub_ln"`` or ``"pre_ln"``.
        conv_placement: ``"input"``, as above, or ``"branch"``: the convolution is a residual branch of its own,
            x + conv(LN x), before the attention of every layer of either type.
        tie_word_embeddings: share the token embedding with the masked-LM decoder.
        pad_token_id: id of the padding token, or None.

    Raises:
        ValueError: an unknown value or sizes that do not fit together; the message says what is allowed.
    """

    model_type = "hbert"
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "num_masked", "num_correct"]

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int | None = None,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        layer_types: Sequence[str] | str | None = None,
        norm_style: str = "sub_ln",
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        classifier_dropout: float | None = None,
        classifier_pooling: str = "mean",
        positions: str = "sinusoidal",
        max_position_embeddings: int = 512,
        type_vocab_size: int = 0,
        init: str = "normal",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        scorer: str = "dense",
        conv_kernel_size: int = 0,
        conv_placement: str = "input",
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _check_positive_int("hidden_size", hidden_size)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.layer_types = _layer_types(layer_types, num_hidden_layers)
        self.num_hidden_layers = len(self.layer_types) if num_hidden_layers is None else num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.norm_style = norm_style
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.classifier_pooling = classifier_pooling
        self.positions = positions
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.init = init
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.scorer = scorer
        self.conv_kernel_size = conv_kernel_size
        self.conv_placement = conv_placement
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        _check_values(self)
        _check_sizes(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; fields among ``kwargs`` are checked like those of ``config_dict``, whose place they take.

        ``num_hidden_layers`` alone takes the first entries of the dictionary's ``layer_types``.

        Raises:
            ValueError: as for :class:`HBertConfig`.
        """
        own = inspect.signature(cls.__init__).parameters
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        if (depth := fields.get("num_hidden_layers")) is not None and "layer_types" not in fields:
            _check_positive_int("num_hidden_layers", depth)
            if given := config_dict.get("layer_types"):
                fields["layer_types"] = given[:depth]
        return super().from_dict({**config_dict, **fields}, **kwargs)

    def check(self) -> None:
        """Checks fields that may have been set since the configuration was made.

        Raises:
            ValueError: as for :class:`HBertConfig`; ``layer_types`` that are letters now.
        """
        if (names := _layer_types(self.layer_types, self.num_hidden_layers)) != list(self.layer_types or ()):
            raise ValueError(f"layer_types is {self.layer_types!r}; set {names}, or give letters to HBertConfig")
        _check_values(self)
        _check_sizes(self)

    @classmethod
    def v1(cls, size: str = "base", **fields: Any) -> HBertConfig:
        """HBERT-v1, (A, S) repeated. ``size``: tiny, mini, small or base; ``fields`` override any field."""
        return cls._preset("AS", size, fields)

    @classmethod
    def v2(cls, size: str = "base", **fields: Any) -> HBertConfig:
        """HBERT-v2, (A, A, S) repeated; arguments as in :meth:`v1`."""
        return cls._preset("AAS", size, fields)

    @classmethod
    def additive(cls, size: str = "base", **fields: Any) -> HBertConfig:
        """Additive attention in every layer; arguments as in :meth:`v1`."""
        return cls._preset("A", size, fields)

    @classmethod
    def vanilla(cls, size: str = "base", **fields: Any) -> HBertConfig:
        """Self-attention in every layer; arguments as in :meth:`v1`."""
        return cls._preset("S", size, fields)

    @classmethod
    def v1c(cls, size: str = "base", **fields: Any) -> HBertConfig:
        """:meth:`v1` with the short convolution (3 taps) in the A layers."""
        return cls.v1(size, **{"conv_kernel_size": 3, **fields})

    @classmethod
    def v2c(cls, size: str = "base", **fields: Any) -> HBertConfig:
        """:meth:`v2` with the short convolution (3 taps) in the A layers."""
        return cls.v2(size, **{"conv_kernel_size": 3, **fields})

    @classmethod
    def additive_c(cls, size: str = "base", **fields: Any) -> HBertConfig:
        """:meth:`additive` with the short convolution (3 taps) in the A layers."""
        return cls.additive(size, **{"conv_kernel_size": 3, **fields})

    @classmethod
    def _preset(cls, pattern: str, size: str, fields: dict[str, Any]) -> HBertConfig:
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; allowed: {', '.join(SIZES)}")
        if "layer_types" in fields:
            raise ValueError("a preset decides layer_types; for another pattern call HBertConfig(layer_types=...)")
        known = inspect.signature(cls.__init__).parameters.keys() | {"attn_implementation"}
        unknown = [name for name in fields if name not in known and not hasattr(PreTrainedConfig(), name)]
        if unknown:
            raise TypeError(f"HBertConfig has no field {', '.join(unknown)}")
        merged = {**SIZES[size], **fields}
        depth = merged["num_hidden_layers"]
        _check_positive_int("num_hidden_layers", depth)
        return cls(layer_types=(pattern * depth)[:depth], **merged)


def _layer_types(given: Sequence[str] | str | None, depth: int | None) -> list[str]:
    if depth is not None:
        _check_positive_int("num_hidden_layers", depth)
    if given is None:
        given = ("AS" * (depth or 12))[: depth or 12]
    types = [LETTERS.get(name, name) for name in given]
    unknown = sorted({repr(name) for name in types if name not in LETTERS.values()})
    if unknown or not types:
        found = ", ".join(unknown) or "no layers"
        raise ValueError(f"layer_types has {found}; allowed: A or {ADDITIVE!r}, S or {SELF!r}, at least one")
    if depth is not None and len(types) != depth:
        raise ValueError(f"layer_types has {len(types)} entries, but num_hidden_layers is {depth}")
    return types


def _check_positive_int(name: str, value: Any, minimum: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _check_values(config: HBertConfig) -> None:
    # 3.0 and False are among the allowed sizes to ``in``.
    _check_positive_int("conv_kernel_size", config.conv_kernel_size, minimum=0)
    choices: dict[str, tuple[Any, ...]] = {
        "norm_style": NORM_STYLES,
        "hidden_act": ACTIVATIONS,
        "positions": POSITIONS,
        "init": INITS,
        "scorer": SCORERS,
        "classifier_pooling": POOLINGS,
        "conv_kernel_size": CONV_KERNEL_SIZES,
        "conv_placement": CONV_PLACEMENTS,
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} is {getattr(config, name)!r}; allowed: {listed}")
    if not isinstance(config.tie_word_embeddings, bool):
        raise ValueError(f"tie_word_embeddings must be True or False, got {config.tie_word_embeddings!r}")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        value = getattr(config, name)
        if value is None and name == "classifier_dropout":
            continue
        if not _is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}")
    for name in ("initializer_range", "layer_norm_eps"):
        value = getattr(config, name)
        if not _is_number(value) or not 0 < value < 1:
            raise ValueError(f"{name} must be a number in (0, 1), got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_sizes(config: HBertConfig) -> None:
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
        _check_positive_int(name, getattr(config, name))
    _check_positive_int("max_position_embeddings", config.max_position_embeddings)
    _check_positive_int("type_vocab_size", config.type_vocab_size, minimum=0)
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ValueError(f"hidden_size {width} is not divisible by num_attention_heads {heads}")
    if config.conv_kernel_size and config.norm_style not in PRE_NORM_STYLES:
        raise ValueError(
            f"conv_kernel_size {config.conv_kernel_size} needs a norm before the attention, which norm_style "
            f"{config.norm_style!r} has not; allowed: conv_kernel_size 0, or norm_style sub_ln or pre_ln"
        )
    pad = config.pad_token_id
    if pad is not None and (not isinstance(pad, int) or not 0 <= pad < config.vocab_size):
        raise ValueError(f"pad_token_id must be None or in [0, {config.vocab_size}), got {pad!r}")


# exist_ok: reloading the module (notebooks, tests) registers again.
AutoConfig.register(HBertConfig.model_type, HBertConfig, exist_ok=True)
