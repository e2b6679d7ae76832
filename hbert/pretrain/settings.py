"""What a run is asked to do, checked before any work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hbert.convert.correspondence import ALL, PARTS
from hbert.errors import HbertError

from .budget import parse_duration
from .models import BERT, DEFAULT_SIZE, dimensions, model_config
from .recipes import DEFAULT_ARCH, DEFAULT_RECIPE, Recipe, hyperparameters, recipe

DTYPES = ("auto", "bf16", "fp32")
DEFAULT_RECIPE_CORPUS = "pypi"
# They change neither the weights nor what is measured, so a run may be taken up with other values.
FREE_OPTIONS = ("out", "resume", "deadline", "save_every", "keep")
# Giving one of these takes the place of the others of its row.
ALTERNATIVES = (("budget", "max_steps"), ("recipe_corpus", "data"))
# Settings that say where files lay when the run began.
PATHS = ("data", "tokenizer", "init_from")
_PYTHONS_NAMES = {"True": "true", "False": "false", "None": "null"}

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """A run. Durations are in seconds; None: decided when the number of steps is known.

    ``fields`` are the overrides of the model's configuration, ``recipe`` has those of the recipe in it.
    Settings with the same ``identity`` give the same weights and the same measurements.
    """

    arch: str
    size: str
    fields: dict[str, Any]
    init_from: str | None
    init_parts: str | None
    recipe_name: str
    recipe: Recipe
    recipe_corpus: str | None
    data: tuple[str, ...]
    tokenizer: str | None
    budget: float | None
    max_steps: int | None
    dtype: str
    compile: bool
    seed: int
    eval_every: int | None
    eval_blocks: int | None
    log_every: int | None
    out: Path
    resume: bool
    deadline: float | None
    save_every: int | None
    keep: int

    @property
    def identity(self) -> dict[str, Any]:
        """Everything but the free options, flat and JSON-serialisable."""
        flat = {name: value for name, value in asdict(self).items() if name not in FREE_OPTIONS}
        fields, hyper = flat.pop("fields"), flat.pop("recipe")
        model = hyper.pop("model") | fields
        flat |= hyper | {f"model.{name}": value for name, value in model.items()}
        return json.loads(json.dumps(flat))


def resolve(options: Options) -> Settings:
    """Returns the settings of these options (a flag's name with underscores, and its value).

    Raises:
        ValueError, HbertError: an option has a value that is not allowed, or two contradict each other.
    """
    given = dict(options)
    name, size = given.get("recipe", DEFAULT_RECIPE), given.get("size", DEFAULT_SIZE)
    hyper = _recipe(name, given, dimensions(size)["hidden_size"])
    arch = _arch(given)
    fields = field_values(given.get("set", ()))
    seed = given.get("seed", 0)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be in [0, 2^64)")
    settings = Settings(
        arch=arch,
        size=size,
        fields=fields,
        init_from=given.get("init_from"),
        init_parts=given.get("init_parts", ALL if given.get("init_from") else None),
        recipe_name=name,
        recipe=hyper,
        recipe_corpus=given.get("recipe_corpus", None if given.get("data") else DEFAULT_RECIPE_CORPUS),
        data=tuple(given.get("data", ())),
        tokenizer=given.get("tokenizer", given.get("init_from")),
        budget=_duration(given, "budget"),
        max_steps=_count(given, "max_steps"),
        dtype=given.get("dtype", "auto"),
        compile=given.get("compile", False),
        seed=seed,
        eval_every=_count(given, "eval_every"),
        eval_blocks=_count(given, "eval_blocks"),
        log_every=_count(given, "log_every"),
        out=run_folder(given),
        resume=given.get("resume", False),
        deadline=_duration(given, "deadline"),
        save_every=_count(given, "save_every"),
        keep=_at_least("keep", given.get("keep", 2), 1),
    )
    _check(settings)
    return settings


def run_folder(options: Options) -> Path:
    """Returns the folder of a run with these options."""
    size, seed = options.get("size", DEFAULT_SIZE), options.get("seed", 0)
    return Path(options.get("out", f"runs/{_arch(options)}-{size}-{seed}"))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes every entry that differs between two identities, ``name (was before, now after)``.

    Where files lie is left out: text and tokenizer are compared when they are read, first weights are not read again.
    """
    names = sorted(name for name in {*before, *now}.difference(PATHS) if before.get(name) != now.get(name))
    return [f"{name} (was {before.get(name)!r}, now {now.get(name)!r})" for name in names]


def _check(settings: Settings) -> None:
    if (settings.budget is None) == (settings.max_steps is None):
        raise HbertError("give either --budget (30m, 24h) or --max-steps")
    if settings.recipe_corpus and settings.data:
        raise HbertError("choose one text: --recipe-corpus or --data")
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype is {settings.dtype!r}; allowed: {', '.join(DTYPES)}")
    _check_initial_weights(settings)
    if settings.recipe.document_borders and settings.arch == BERT:
        raise ValueError("document_borders needs packed sequences, which arch bert has not")
    vocab = settings.recipe.vocab_size
    config = model_config(settings.arch, settings.size, settings.fields, settings.recipe, vocab)
    positions: int = config.max_position_embeddings
    if settings.recipe.block_size > positions:
        raise ValueError(f"block_size {settings.recipe.block_size} exceeds max_position_embeddings {positions}")


def _check_initial_weights(settings: Settings) -> None:
    if settings.init_from is None and settings.init_parts is not None:
        raise HbertError("--init-parts goes with --init-from")
    if settings.init_parts not in (None, *PARTS):
        raise ValueError(f"init_parts is {settings.init_parts!r}; allowed: {', '.join(PARTS)}")
    if settings.init_from is not None and settings.arch == BERT:
        raise ValueError(f"--init-from needs a model of ours, which arch {BERT} is not")


def _arch(given: Options) -> str:
    return given.get("arch", DEFAULT_ARCH[given.get("recipe", DEFAULT_RECIPE)])


def _recipe(name: str, given: Options, hidden_size: int) -> Recipe:
    base = recipe(name, hidden_size)
    return replace(base, **{name: given[name] for name in hyperparameters() if name in given})


def field_values(assignments: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of words like ``norm_style=post_ln``; values are JSON, Python's True, False, None, or text.

    Raises:
        ValueError: a word without a name or without ``=``.
    """
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes FIELD=VALUE, got {assignment!r}")
        try:
            fields[name] = json.loads(_PYTHONS_NAMES.get(text, text))
        except json.JSONDecodeError:
            fields[name] = text
    return fields


def _duration(given: Options, name: str) -> float | None:
    if name not in given:
        return None
    try:
        return parse_duration(given[name])
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None


def _count(given: Options, name: str) -> int | None:
    return _at_least(name, given[name], 1) if name in given else None


def _at_least(name: str, value: int, minimum: int) -> int:
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")
    return value
