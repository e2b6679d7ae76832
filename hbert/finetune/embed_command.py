"""``hbert embed``: turns texts into vectors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hbert.data.storage import replacing
from hbert.data.terminal import output_console
from hbert.errors import HbertError
from hbert.precision import device_of

from .inference import POOLINGS, pooled_states
from .models import load_encoder
from .options import prepare_process
from .sentence_modules import pooling_and_normalize
from .stream import add_stream_arguments, load_runner, open_stream, writing

SUFFIXES = (".npy", ".safetensors")
TENSOR = "embeddings"


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("embed", help=summary, description=summary)
    add_stream_arguments(parser, SUFFIXES)
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="of the last hidden states: all tokens or the first (default: what modules.json says, else mean)",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="vectors of length 1 (default: where modules.json says so)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command: float32 [number of texts, width] in the order of the texts."""
    prepare_process()
    stream = open_stream(args, SUFFIXES)
    model = load_encoder(args.model, device_of(args))
    pooling, normalize = pooling_and_normalize(args.model, args.pooling, args.normalize)
    runner, max_length = load_runner(args, model, pooled_states(pooling, normalize))
    with writing(args.out), writing_rows(args.out, stream.count, model.config.hidden_size) as write:
        for vectors in stream.results(runner, max_length, "embed"):
            write(vectors)
    for line in stream.summary(runner, max_length):
        output_console().print(line, markup=False, soft_wrap=True)


@contextmanager
def writing_rows(path: Path, rows: int, columns: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields what appends rows to a float32 array [rows, columns] in a file that takes its name once all are there.

    The file is an ``.npy``, or a ``.safetensors`` with one tensor, ``embeddings``; it need not fit into
    memory.

    Raises:
        HbertError: there were fewer rows, or more: the texts have changed since they were counted.
    """
    written = 0

    def write(part: np.ndarray) -> None:
        nonlocal written
        file.write(part.astype("<f4").tobytes())
        written += len(part)

    with replacing(path) as temporary:
        # Closed before it is renamed, which Windows insists on.
        with open(temporary, "wb") as file:
            header = _npy_header if path.suffix == ".npy" else _safetensors_header
            header(file, rows, columns)
            yield write
        if written != rows:
            raise HbertError(f"the input has changed while it was read: {rows:,} texts, then {written:,}")


def _npy_header(file: BinaryIO, rows: int, columns: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(file, header)


def _safetensors_header(file: BinaryIO, rows: int, columns: int) -> None:
    """The format by hand (length of the header, header, data): its library writes only what is in memory."""
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}
    header = json.dumps({TENSOR: entry}).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
