"""``hbert tokenizer``: trains a WordPiece vocabulary, or takes one, and saves it as a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hbert.errors import HbertError

from .corpus_command import add_corpus_arguments, corpus_from_arguments, has_corpus
from .terminal import output_console
from .tokenizer import DEFAULT_VOCAB_SIZE, load_tokenizer, packaged_tokenizer, save_tokenizer, train_tokenizer


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("tokenizer", help=summary, description=summary)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, for AutoTokenizer to load")
    parser.add_argument(
        "--size", type=int, metavar="N", help=f"vocabulary size to train (default {DEFAULT_VOCAB_SIZE})"
    )
    parser.add_argument("--from-package", metavar="NAME", help="take the vocabulary of a pinned package instead")
    parser.add_argument(
        "--vocab", metavar="FILE", help="take vocab.txt (as uncased), tokenizer.json or a tokenizer folder instead"
    )
    add_corpus_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    origins = [has_corpus(args), args.from_package is not None, args.vocab is not None]
    if sum(origins) != 1:
        raise HbertError("choose one: a corpus to train on (--recipe, --fetch, ...), --from-package, or --vocab")
    if args.size is not None and not has_corpus(args):
        raise HbertError("--size goes with a corpus to train on")
    tokenizer = _tokenizer(args)
    _refuse_other_tokenizer(Path(args.out), tokenizer)
    save_tokenizer(tokenizer, args.out)
    output_console().print(f"{tokenizer.get_vocab_size():,} pieces written to {args.out}", markup=False)


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.from_package is not None:
        return packaged_tokenizer(args.from_package)
    if args.vocab is not None:
        return load_tokenizer(args.vocab)
    size = DEFAULT_VOCAB_SIZE if args.size is None else args.size
    return train_tokenizer(corpus_from_arguments(args), size)


def _refuse_other_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """A trained model is worthless without the tokenizer that it was trained with."""
    if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).to_str() != tokenizer.to_str():
        raise HbertError(f"{folder} already holds another tokenizer; choose another folder")
