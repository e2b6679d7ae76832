"""``hbert convert``: a BERT, RoBERTa, XLM-R, DistilBERT or HBERT checkpoint as an HBERT model folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from hbert.config import HBertConfig
from hbert.data.terminal import output_console
from hbert.errors import HbertError
from hbert.pretrain.checkpoint import WRITE_ERRORS, complete_folder
from hbert.pretrain.models import PRESETS, check_fields, hbert_config, model_fields
from hbert.pretrain.settings import field_values

from . import build, read_source
from .files import has_tokenizer
from .positions import EXTENSIONS

# What --arch decides; the other fields are the checkpoint's.
_OF_ARCH = ("layer_types", "norm_style", "init", "scorer", "conv_kernel_size", "conv_placement")


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("convert", help=summary, description=summary)
    parser.add_argument("source", metavar="SOURCE", help="folder with config.json and weights")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument(
        "--arch",
        help=f"another encoder of the same width: {', '.join(PRESETS)}, or a letter a layer: AASAAS "
        "(default: the one that computes the same)",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="fields of its configuration"
    )
    parser.add_argument("--max-positions", type=int, metavar="N", help="longest sequence (default: the checkpoint's)")
    parser.add_argument(
        "--extend-positions",
        choices=tuple(EXTENSIONS),
        help="how learned positions become more: stretched, or sinusoids of the same size in their place",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command. What is new in a hybrid is drawn with seed 0."""
    folder, out = Path(args.source), Path(args.out)
    _check_out(out)
    disable_progress_bar()
    source = read_source(folder)
    fields = field_values(args.set)
    target = _target(source.config, args.arch, fields)
    tokenizer = _tokenizer(folder)
    torch.manual_seed(0)
    model, report = build(source, target, max_positions=args.max_positions, extend_positions=args.extend_positions)
    if tokenizer is not None and (args.max_positions is not None or "max_position_embeddings" in fields):
        tokenizer.model_max_length = model.config.max_position_embeddings
    _write(out, model, tokenizer)
    say = partial(output_console().print, markup=False, soft_wrap=True)
    say(str(report))
    if tokenizer is None:
        say(f"no tokenizer: there is none in {folder}")
    moved = sum(model.get_parameter(name).numel() for name in report.moved)
    say(f"{type(model).__name__}, {moved:,} of {model.num_parameters():,} parameters moved: written to {out}")


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HbertError(f"{out} is not an empty folder; choose another")


def _target(own: HBertConfig, arch: str | None, fields: Mapping[str, Any]) -> HBertConfig | None:
    """The configuration that was asked for; None: the checkpoint's."""
    check_fields(HBertConfig, fields)
    if arch is None and not fields:
        return None
    kept = {name: value for name, value in model_fields(own).items() if name != "model_type"}
    if arch is None:
        return HBertConfig(**{**kept, **fields})
    kept = {name: value for name, value in kept.items() if name not in _OF_ARCH}
    return hbert_config(arch, {**kept, **fields})


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder; saving it makes it independent of the checkpoint's type."""
    if not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # Damaged files, unknown classes and missing packages raise a dozen unrelated types.
        raise HbertError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}") from error


def _write(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    try:
        with complete_folder(out) as temporary:
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    except WRITE_ERRORS as error:
        raise HbertError(f"{out} could not be written: {error}") from error
