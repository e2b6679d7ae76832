"""Texts of a file of any size, in pieces: what ``hbert predict`` and ``hbert embed`` share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from hbert.data.terminal import counted, progress
from hbert.errors import HbertError
from hbert.precision import add_precision_arguments, prepared

from .encoding import encode_texts
from .examples import cell_text
from .inference import BATCH_TOKENS, Readout, Runner
from .models import load_text_tokenizer, text_length
from .options import add_text_arguments
from .rows import Rows, check_column, open_rows

# Texts that are sorted by length together, and whose results are in memory at once.
PIECE = 16_384


@dataclass(frozen=True)
class TextStream:
    """The texts of a file, after a first reading that found nothing wrong.

    Attributes:
        count: number of texts.
        num_empty: how many of them are empty. They are read as any other text: results stay in line with the
            file.
    """

    rows: Rows
    text_column: str
    pair_column: str | None
    count: int
    num_empty: int

    @classmethod
    def open(cls, path: str, text_column: str, pair_column: str | None, names: Sequence[str] | None) -> TextStream:
        """Reads the file once to check and count it.

        Raises:
            HbertError: no such file or column, or a malformed line; the message names it.
        """
        rows = open_rows(path, names)
        check_column(rows, text_column, "--text-column")
        if pair_column is not None:
            check_column(rows, pair_column, "--text-pair-column")
        stream = cls(rows, text_column, pair_column, 0, 0)
        count = num_empty = 0
        for cells in stream._texts():
            count += 1
            num_empty += not all(cell.strip() for cell in cells)
        if not count:
            raise HbertError(f"{path} has no rows")
        return cls(rows, text_column, pair_column, count, num_empty)

    def pieces(self) -> Iterator[tuple[list[str], list[str] | None]]:
        """Yields at most PIECE texts at once, with their second texts."""
        texts = self._texts()
        while piece := list(islice(texts, PIECE)):
            columns = [list(column) for column in zip(*piece, strict=True)]
            yield columns[0], columns[1] if self.pair_column is not None else None

    def _texts(self) -> Iterator[tuple[str, ...]]:
        columns = (self.text_column,) if self.pair_column is None else (self.text_column, self.pair_column)
        for row in self.rows:
            yield tuple(cell_text(self.rows, row, column) for column in columns)

    def results(self, runner: Runner, max_length: int, title: str) -> Iterator[np.ndarray]:
        """Yields the results of the texts, float32 [n, W] a piece, in their order; shows progress."""
        with progress(title, self.count) as advance:
            for texts, pairs in self.pieces():
                yield runner.run(encode_texts(runner.tokenizer, texts, pairs, max_length), advance)

    def summary(self, runner: Runner, max_length: int) -> list[str]:
        """What was done, and what was odd about the texts, as lines."""
        lines = [runner.pace()]
        if runner.truncated:
            lines.append(f"{counted(runner.truncated, 'text')} truncated to {max_length} tokens")
        if self.num_empty:
            rest = "is empty; its result means" if self.num_empty == 1 else "are empty; their results mean"
            lines.append(f"{counted(self.num_empty, 'text')} {rest} nothing")
        return lines


def add_stream_arguments(parser: argparse.ArgumentParser, suffixes: Sequence[str]) -> None:
    """Adds the flags that both commands have."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="checkpoint folder or hub name, with its tokenizer"
    )
    parser.add_argument("--input", required=True, metavar="F", help=".csv, .tsv, .jsonl, or .txt with a text a line")
    parser.add_argument("--out", required=True, type=Path, metavar="F", help=f"file to write: {', '.join(suffixes)}")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    add_text_arguments(parser)
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help=f"of a batch (default {BATCH_TOKENS})"
    )
    add_precision_arguments(parser)


def open_stream(args: argparse.Namespace, suffixes: Sequence[str]) -> TextStream:
    """Checks the arguments and opens the input.

    Raises:
        HbertError, ValueError: a wrong one; nothing has been loaded or written.
    """
    if args.batch_tokens < 1:
        raise ValueError(f"batch_tokens is {args.batch_tokens}; it must be at least 1")
    _check_target(args.out, suffixes, args.overwrite)
    return TextStream.open(args.input, args.text_column, args.text_pair_column, args.columns)


def _check_target(out: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    if out.suffix not in suffixes:
        raise HbertError(f"--out {out}: the suffix must be one of {', '.join(suffixes)}")
    if out.is_dir() or (out.exists() and not overwrite):
        raise HbertError(f"--out {out} exists; choose another name{'' if out.is_dir() else ', or --overwrite'}")
    folder = out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise HbertError(f"--out {out}: its folder must exist and be writable")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Surrounds what writes the file ``out``.

    Raises:
        HbertError: it could not be written, as on a full disk.
    """
    try:
        yield
    except OSError as error:
        raise HbertError(f"{out} could not be written: {error}") from error


def load_runner(args: argparse.Namespace, model: PreTrainedModel, readout: Readout) -> tuple[Runner, int]:
    """Returns a runner of the model with its tokenizer, and the tokens that texts are truncated to.

    Raises:
        HbertError, ValueError: the tokenizer does not fit, --max-length is out of range, or the model cannot be
            optimized.
    """
    tokenizer = load_text_tokenizer(args.model, model)
    max_length = text_length(model, tokenizer, args.max_length, args.text_pair_column is not None)
    ready, dtype, _ = prepared(model, args)
    return Runner(ready, tokenizer, readout, dtype, args.batch_tokens), max_length
