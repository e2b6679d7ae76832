"""The options of ``hbert pretrain``: as flags, and as a YAML file with the same names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hbert.convert.correspondence import PARTS
from hbert.data.sources import RECIPES as TEXT_RECIPES
from hbert.errors import HbertError

from .models import BERT, DEFAULT_SIZE, PRESETS, dimensions
from .recipes import OPTIMIZERS, RECIPES, SCHEDULES, help_of, hyperparameters
from .settings import ALTERNATIVES, DTYPES

_CHOICES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; those that are not given are absent from the namespace."""
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; flags win over it")
    _add_run_arguments(parser.add_argument_group("run"))
    _add_model_arguments(parser.add_argument_group("model"))
    _add_text_arguments(parser.add_argument_group("text"))
    about = f"the others override single values of it; their defaults are those at --size {DEFAULT_SIZE}"
    _add_recipe_arguments(parser.add_argument_group("recipe", about))
    for action in parser._actions:
        action.default = argparse.SUPPRESS


def _add_run_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--budget", metavar="TIME", help="time for optimizer steps: 90s, 30m, 24h, 1h30m")
    group.add_argument("--max-steps", type=int, metavar="N", help="number of steps, instead of --budget")
    group.add_argument("--deadline", metavar="TIME", help="stop training this long after the start, save, end")
    group.add_argument("--dtype", choices=DTYPES, help="auto (default): bf16 where the device computes it")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--seed", type=int, metavar="N", help="of weights, batches, masks, dropout (default 0)")
    group.add_argument("--out", metavar="DIR", help="run folder (default runs/ARCH-SIZE-SEED)")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    group.add_argument("--save-every", type=int, metavar="STEPS", help="between checkpoints")
    group.add_argument("--keep", type=int, metavar="N", help="checkpoints to keep (default 2)")
    group.add_argument(
        "--eval-every", type=int, metavar="STEPS", help="between evaluations (default: 20 in all, fewer in a short run)"
    )
    group.add_argument("--eval-blocks", type=int, metavar="N", help="held-out blocks of each (default: 65,536 tokens)")
    group.add_argument("--log-every", type=int, metavar="STEPS", help="between lines of metrics.jsonl")


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    names = ", ".join([*PRESETS, BERT])
    group.add_argument("--arch", help=f"{names}, or a letter a layer: AASAAS (default: the recipe's)")
    group.add_argument(
        "--size", help=f"tiny, mini, small, base, or layers x width x heads: 6x256x4 (default {DEFAULT_SIZE})"
    )
    group.add_argument(
        "--set", nargs="+", action="extend", metavar="FIELD=VALUE", help="fields of the model's configuration"
    )
    group.add_argument(
        "--init-from", metavar="DIR", help="first weights and tokenizer of a checkpoint of the same width"
    )
    group.add_argument(
        "--init-parts", choices=PARTS, help="of these: the token embedding, or all that correspond (default)"
    )


def _add_text_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe-corpus", metavar="NAME", help=f"{', '.join(TEXT_RECIPES)} (default pypi), or one source"
    )
    group.add_argument("--data", nargs="+", metavar="PATH", help="your own text, as in hbert corpus --text")
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder, tokenizer.json or vocab.txt, as uncased (default: that of --init-from, else trained)",
    )


def _add_recipe_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--recipe", choices=list(RECIPES), help="way to train (default budget)")
    width = dimensions(DEFAULT_SIZE)["hidden_size"]
    for name, kind in hyperparameters().items():
        how: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if name in _CHOICES:
            how = {"choices": _CHOICES[name]}
        if kind is bool:
            how = {"action": "store_true"}
        group.add_argument(_flag(name), help=help_of(name, width), **how)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the flags and of the file that ``--config`` names.

    Raises:
        HbertError: the file cannot be read, or has an unknown name or a wrong value.
    """
    flags = {name: value for name, value in vars(args).items() if name != "command"}
    path = flags.pop("config", None)
    return flags if path is None else overridden(read_config(path), flags)


def overridden(options: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``options`` with those of ``by`` in their place; fields of the model add up."""
    kept = dict(options)
    for row in ALTERNATIVES:
        if any(name in by for name in row):
            kept = {name: value for name, value in kept.items() if name not in row}
    both = {"set": [*kept["set"], *by["set"]]} if "set" in kept and "set" in by else {}
    return {**kept, **by, **both}


def read_config(path: str) -> dict[str, Any]:
    """Returns the options of a YAML file, checked as the flags of the same names are.

    Raises:
        HbertError: no such file, not a YAML mapping, an unknown name, or a value that the flag refuses.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise HbertError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise HbertError(f"{path} must hold names and values, as in 'budget: 30m'")
    parser = _ConfigParser(path)
    add_arguments(parser)
    parser.check_names(content)
    words = [word for name, value in content.items() for word in _words(str(name), value)]
    return vars(parser.parse_args(words))


class _ConfigParser(argparse.ArgumentParser):
    def __init__(self, path: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._path = path

    def error(self, message: str) -> NoReturn:
        raise HbertError(f"{self._path}: {message}")

    def check_names(self, content: Mapping[Any, Any]) -> None:
        allowed = [action.dest for action in self._actions if action.dest != "config"]
        if unknown := sorted(str(n) for n in content if str(n).replace("-", "_") not in allowed):
            raise HbertError(f"{self._path}: unknown {', '.join(unknown)}; allowed: {', '.join(allowed)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(name: str, value: Any) -> list[str]:
    """A line of the file as command-line words."""
    flag = _flag(name)
    if value is True:
        return [flag]
    if value is False or value is None:
        return []
    if isinstance(value, dict):
        return [flag, *(f"{field}={_literal(entry)}" for field, entry in value.items())]
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]


def _literal(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
