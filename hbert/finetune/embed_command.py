"""``hbert embed``: turns texts into vectors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hbert.data.storage import replacing
from hbert.data.terminal import output_console

from .inference import POOLINGS, pooled_states
from .models import load_encoder
from .options import prepare_process
from .stream import add_stream_arguments, load_runner, open_stream

SUFFIXES = (".npy", ".safetensors")
TENSOR = "embeddings"


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("embed", help=summary, description=summary)
    add_stream_arguments(parser, SUFFIXES)
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="of the last hidden states: all tokens (default) or the first",
    )
    parser.add_argument("--normalize", action="store_true", help="vectors of length 1")


def run(args: argparse.Namespace) -> None:
    """Runs the command: float32 [number of texts, width] in the order of the texts."""
    prepare_process()
    stream = open_stream(args, SUFFIXES)
    model = load_encoder(args.model)
    runner, max_length = load_runner(args, model, pooled_states(args.pooling, args.normalize))
    with writing_array(args.out, stream.count, model.config.hidden_size) as array:
        start = 0
        for vectors in stream.results(runner, max_length, "embed"):
            array[start : start + len(vectors)] = vectors
            start += len(vectors)
    for line in stream.summary(runner, max_length):
        output_console().print(line, markup=False, soft_wrap=True)


@contextmanager
def writing_array(path: Path, rows: int, columns: int) -> Iterator[np.memmap]:
    """Yields a float32 array [rows, columns] in a file that takes its name once the block is done.

    The file is an ``.npy``, or a ``.safetensors`` with one tensor, ``embeddings``; it need not fit into
    memory.
    """
    with replacing(path) as temporary:
        if path.suffix == ".npy":
            array = np.lib.format.open_memmap(temporary, "w+", np.dtype("<f4"), (rows, columns))
        else:
            array = _safetensors_array(temporary, rows, columns)
        yield array
        array.flush()


def _safetensors_array(path: Path, rows: int, columns: int) -> np.memmap:
    """The format by hand (length of the header, header, data): its library writes only what is in memory."""
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}
    header = json.dumps({TENSOR: entry}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return np.memmap(path, np.dtype("<f4"), "r+", 8 + len(header), (rows, columns))
