"""``hbert export``: an HBERT checkpoint as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

import hbert
from hbert.convert.files import read_config
from hbert.data.terminal import output_console
from hbert.errors import HbertError
from hbert.inference.checkpoint import load_pretrained

from .modeling import HBertPreTrainedModel


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("export", help=summary, description=summary)
    parser.add_argument("model", metavar="MODEL", help="folder of an HBERT model, with or without a head")
    parser.add_argument("out", metavar="OUT", help="file to write, such as model.onnx")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    folder, out = Path(args.model), Path(args.out)
    if out.is_dir() or (out.exists() and not args.overwrite):
        raise HbertError(f"{out} exists; choose another name or pass --overwrite")
    disable_progress_bar()
    model = _load(folder)
    hbert.export_onnx(model, out)
    size = out.stat().st_size / 1e6
    output_console().print(
        f"{type(model).__name__}, checked in ONNX Runtime: {size:.1f} MB in {out}", markup=False, soft_wrap=True
    )


def _load(folder: Path) -> HBertPreTrainedModel:
    config = read_config(folder)
    if config.model_type != "hbert":
        raise HbertError(f"{folder} is a {config.model_type} model; hbert convert makes an HBERT of it")
    model = load_pretrained(folder)
    assert isinstance(model, HBertPreTrainedModel)
    return model
