"""Predictions as files: a line for every text, in the order of the texts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hbert.data.storage import replacing
from hbert.errors import HbertError

from .metrics import decide
from .rows import has_column, open_rows

SUFFIXES = (".tsv", ".csv", ".jsonl")
_COLUMNS = ("prediction", "probability")


@dataclass
class PredictionWriter:
    """Appends predictions to an open file of one of SUFFIXES.

    Columns: ``label`` (where truths are given), ``prediction``, ``probability``. Of a multi-label model these
    are all labels with a probability above 1/2, in CSV and TSV joined by ``separator``.
    """

    file: TextIO
    suffix: str
    names: Sequence[str]
    multi: bool
    separator: str = ","

    def begin(self, labelled: bool) -> None:
        """Writes the header."""
        if self.suffix != ".jsonl":
            self._table(["label", *_COLUMNS] if labelled else _COLUMNS)

    def write(self, probabilities: np.ndarray, truths: Iterable[Sequence[str]] | None = None) -> None:
        """Writes a line for each row of float [N, C]; ``truths`` are the labels of each."""
        decided = decide(probabilities, self.multi)
        labels = None if truths is None else iter(truths)
        for row, decision in zip(probabilities, decided, strict=True):
            chosen = np.flatnonzero(decision).tolist() if self.multi else [int(decision)]
            cells: list[list[Any]] = [[self.names[k] for k in chosen], [round(float(row[k]), 6) for k in chosen]]
            self._line(cells if labels is None else [list(next(labels)), *cells])

    def _line(self, cells: list[list[Any]]) -> None:
        if self.suffix != ".jsonl":
            self._table([self.separator.join(map(str, cell)) for cell in cells])
            return
        columns = ("label", *_COLUMNS)[-len(cells) :]
        values = cells if self.multi else [cell[0] for cell in cells]
        self.file.write(json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False) + "\n")

    def _table(self, cells: Iterable[str]) -> None:
        if self.suffix == ".tsv":
            # Labels are names in one line: nothing needs quotes, and open_rows takes them for letters.
            self.file.write("\t".join(cells) + "\n")
        else:
            csv.writer(self.file, lineterminator="\n").writerow(cells)


@contextmanager
def writing_predictions(
    path: Path, names: Sequence[str], multi: bool, separator: str, labelled: bool = False
) -> Iterator[PredictionWriter]:
    """Yields a writer to a file that takes its name once all is written.

    Raises:
        HbertError: a label contains the separator that would part it from others.
    """
    clash = [name for name in names if multi and path.suffix != ".jsonl" and separator in name]
    if clash:
        raise HbertError(f"the label {clash[0]!r} contains {separator!r}; choose another --label-separator")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = PredictionWriter(file, path.suffix, names, multi, separator)
        writer.begin(labelled)
        yield writer


def read_predictions(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels and the predictions of a file with both, as strings [N].

    Raises:
        HbertError: no such file, or a column is missing or there twice.
    """
    rows = open_rows(path)
    if missing := [name for name in ("label", "prediction") if not has_column(rows, name)]:
        raise HbertError(f"{rows.name} has no column {missing[0]!r}: it is not a file of predictions on labelled texts")
    pairs = [(str(row.cells["label"]), str(row.cells["prediction"])) for row in rows]
    labels, predictions = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(labels), np.array(predictions)
