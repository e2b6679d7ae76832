"""Recipes: everything about training that is neither the model's shape nor the text, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("linear", "cosine", "wsd")
DEFAULT_RECIPE = "budget"
# The model of each recipe where none is named.
DEFAULT_ARCH = {"budget": "v1c", "paper": "v1", "vanilla": "vanilla"}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """One way to train. What a field is stands beside it, and in ``hbert pretrain --help``.

    model: fields of HBertConfig that belong to the recipe; an encoder that is not ours takes none of them.

    Raises:
        ValueError: a value out of its range; the message says what is allowed.
    """

    vocab_size: int = _option(30_522, "pieces of the WordPiece tokenizer that is trained where none is given")
    batch_size: int = _option(16, "blocks of a step, over all processes")
    block_size: int = _option(128, "tokens of a block")
    accumulate: int = _option(1, "forward and backward passes that each process splits its rows of a batch into")
    document_borders: bool = _option(
        False, "a document inside a block attends to itself only, and its positions start at 0"
    )
    masking_rate: float = _option(0.15, "share of the tokens to predict")
    mask_replace: float = _option(0.8, "share of these that becomes [MASK]")
    random_replace: float = _option(0.1, "share of these that becomes a random token; the rest stays as it is")
    optimizer: str = _option("adamw", "adamw, or muon for the matrices of the encoder's linear layers")
    lr: float = _option(1e-3, "peak learning rate")
    muon_lr: float = _option(0.01, "that of the matrices under muon")
    beta1: float = _option(0.9, "decay of adamw's mean of the gradient")
    beta2: float = _option(0.999, "decay of adamw's mean of its square")
    weight_decay: float = _option(0.01, "of the weights of linear layers and embeddings")
    warmup: float = _option(0.03, "share of the steps in which the learning rates rise linearly")
    schedule: str = _option("linear", "then linear or cosine to 0, or wsd: constant, and linear to 0 at the end")
    decay: float = _option(0.2, "share of the steps in which wsd falls")
    clip: float = _option(1.0, "largest norm of the whole gradient; 0 does not clip")
    dropout: float = _option(0.0, "of hidden states and of attention weights")
    ramp_start: int = _option(0, "blocks of the first step, from which the batch grows linearly; 0: no ramp")
    ramp_fraction: float = _option(0.0, "share of the steps in which it grows to batch_size")
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)


def recipe(name: str, hidden_size: int) -> Recipe:
    """Returns the recipe of this name for a model of this width.

    Raises:
        ValueError: an unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name](hidden_size)


def hyperparameters() -> dict[str, type]:
    """Returns name and type of every field of ``Recipe`` that a user may override."""
    types: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
    return {entry.name: types[str(entry.type)] for entry in fields(Recipe) if entry.name != "model"}


def help_of(name: str, hidden_size: int) -> str:
    """Returns what a hyperparameter is, and its value in each recipe for a model of this width."""
    text = next(entry.metadata["help"] for entry in fields(Recipe) if entry.name == name)
    values = {recipe_name: getattr(recipe(recipe_name, hidden_size), name) for recipe_name in RECIPES}
    if len(set(values.values())) == 1:
        return f"{text} (default {values.popitem()[1]})"
    return f"{text} (default: {', '.join(f'{recipe_name} {value}' for recipe_name, value in values.items())})"


def _budget(hidden_size: int) -> Recipe:
    """Minutes to hours on one machine: small batches, many steps, no dropout.

    Initial weights are drawn with a standard deviation of about 1 / sqrt(width), which .02 is for a base model only:
    a narrow model with .02 stays much longer where it knows the commonest words alone. Up to a width of 128 a run
    of a minute must leave that plateau behind: smaller batches and larger steps.

    Muon learns more in a step. What it adds to one grows with the width, in relation to the tokens: .2 to .3 of a step
    of 2,048 tokens at a width of 256; by its operations as much as the rest of it at 768, where it was not tried.
    """
    tiny = hidden_size <= 128
    # A sinusoidal table is 25 times as large as fresh word embeddings, which the norm then drowns.
    model = {"norm_style": "sub_ln", "positions": "learned", "init": "normal", "hidden_act": "gelu"}
    return Recipe(
        vocab_size=8192,
        masking_rate=0.3,
        batch_size=4 if tiny else 16,
        optimizer="muon" if hidden_size <= 256 else "adamw",
        lr=1e-2 if tiny else 2e-3 if hidden_size <= 256 else 1e-3 if hidden_size <= 512 else 5e-4,
        beta2=0.98,
        model=model | ({"initializer_range": 0.05} if hidden_size <= 256 else {}),
    )


def _paper(hidden_size: int) -> Recipe:
    """HybridBERT's published checkpoints: Adam, lr 1e-5, batch 48 of 512 tokens, relu, dropout .05.

    Their decay was planned over 610,000 steps, of which a budget of 24 hours saw the first 80,000: hence no
    decay here. Their 10,000 steps of warmup are an eighth of that budget.
    """
    return Recipe(
        batch_size=48,
        block_size=512,
        lr=1e-5,
        weight_decay=0.0,
        warmup=0.125,
        schedule="wsd",
        decay=0.0,
        dropout=0.05,
        model={"norm_style": "sub_ln", "positions": "sinusoidal", "init": "normal", "hidden_act": "relu"},
    )


def _vanilla(hidden_size: int) -> Recipe:
    """BERT's own settings (Devlin et al. 2019) but for batch and vocabulary, which are those of ``budget``."""
    return Recipe(
        vocab_size=8192,
        lr=1e-4,
        warmup=0.01,
        dropout=0.1,
        model={"norm_style": "post_ln", "positions": "learned", "init": "normal", "hidden_act": "gelu"},
    )


RECIPES: dict[str, Callable[[int], Recipe]] = {"budget": _budget, "paper": _paper, "vanilla": _vanilla}


def _check(given: Recipe) -> None:
    for name in ("batch_size", "block_size", "accumulate"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name} is {getattr(given, name)}; it must be at least 1")
    for name in ("lr", "muon_lr"):
        if not 0 < getattr(given, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(given, name)}; it must be above 0")
    for name in ("weight_decay", "clip"):
        if not 0 <= getattr(given, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(given, name)}; it must be at least 0")
    for name in ("mask_replace", "random_replace", "warmup", "decay", "ramp_fraction"):
        if not 0 <= getattr(given, name) <= 1:
            raise ValueError(f"{name} is {getattr(given, name)}; allowed is [0, 1]")
    for name in ("beta1", "beta2", "dropout"):
        if not 0 <= getattr(given, name) < 1:
            raise ValueError(f"{name} is {getattr(given, name)}; allowed is [0, 1)")
    if not 0 < given.masking_rate <= 1:
        raise ValueError(f"masking_rate is {given.masking_rate}; allowed is (0, 1]")
    if given.mask_replace + given.random_replace > 1 + 1e-9:
        raise ValueError("mask_replace + random_replace is above 1")
    for name, allowed in {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}.items():
        if getattr(given, name) not in allowed:
            raise ValueError(f"{name} is {getattr(given, name)!r}; allowed: {', '.join(allowed)}")
    _check_batch(given)


def _check_batch(given: Recipe) -> None:
    if (given.ramp_start > 0) != (given.ramp_fraction > 0):
        raise ValueError("a batch ramp needs both ramp_start and ramp_fraction")
    if not 0 <= given.ramp_start <= given.batch_size:
        raise ValueError(f"ramp_start is {given.ramp_start}; allowed is [0, batch_size {given.batch_size}]")
    smallest = given.ramp_start or given.batch_size
    if given.accumulate > smallest:
        raise ValueError(f"accumulate is {given.accumulate}, but a batch has only {smallest} blocks")
