"""Rows of text: CSV, TSV, JSON lines, plain lines, and splits of Hugging Face data sets, read as streams.

Files are read by the modules of Python, not by ``datasets``: cells stay the strings that they are (a text
"NA" or "true" is a text), and an error names the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hbert.data.terminal import counted
from hbert.errors import HbertError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
TEXT = "text"
# Long documents stand in one cell; the csv module's own limit is 131,072 characters.
_CELL_CHARACTERS = 1 << 30


@dataclass(frozen=True)
class Row:
    """The cells of a row by column, and the line (1-based) that it begins or stands in."""

    line: int
    cells: Mapping[str, Any]


class Rows(Protocol):
    """Something that can be iterated over many times.

    Attributes:
        name: what it is called in messages.
        unit: what ``Row.line`` counts: "line" or "row".
    """

    name: str
    unit: str

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows; raises HbertError where one is malformed."""

    def columns(self) -> list[str]:
        """The names of the columns (those of the first row where every row has its own)."""

    def declared_labels(self, column: str) -> list[str] | None:
        """The labels that the data set itself lists for a column, in its order; None where it lists none."""


def open_rows(path: str | Path, names: Sequence[str] | None = None) -> Rows:
    """Returns the rows of a file, by its suffix.

    Args:
        path: ``.csv`` (comma, cells may be quoted), ``.tsv`` (tab, quotes are letters like any other),
            ``.jsonl`` (an object a line), ``.txt`` (a text a line, the column ``text``).
        names: of the columns of a ``.csv`` or ``.tsv`` file without a header; None: its first line names
            them.

    Raises:
        HbertError: no such file, another suffix, or ``names`` for a file that names its columns itself.
    """
    path = Path(path)
    if not path.is_file():
        raise HbertError(f"no such file: {path}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise HbertError(f"{path}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix in (".csv", ".tsv"):
        return _TableFile(path, names)
    if names is not None:
        raise HbertError(f"--columns names the columns of CSV and TSV files without a header, not of {path}")
    return _JsonLines(path) if suffix == ".jsonl" else _PlainLines(path)


def has_column(rows: Rows, column: str) -> bool:
    """Whether there is such a column.

    Raises:
        HbertError: there are several.
    """
    number = rows.columns().count(column)
    if number > 1:
        raise HbertError(f"{rows.name} has {number} columns {column!r}; rename all but one")
    return number == 1


def check_column(rows: Rows, column: str, flag: str) -> None:
    """Checks that there is such a column.

    Raises:
        HbertError: there is none, and the message names those that exist; or there are several.
    """
    if has_column(rows, column):
        return
    hint = ""
    if isinstance(rows, _TableFile) and rows.names is None:
        hint = "; if its first line is not a header, name the columns with --columns"
    columns = _listed(rows.columns())
    raise HbertError(f"{rows.name} has no column {column!r}; it has: {columns} ({flag} chooses one{hint})")


def _listed(columns: Sequence[str]) -> str:
    """Names of columns for a message, in quotes: a space may be all that one differs in."""
    return ", ".join(map(repr, columns))


class _File:
    unit = "line"

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)

    def declared_labels(self, column: str) -> list[str] | None:
        return None

    def columns(self) -> list[str]:
        return [TEXT]

    def _lines(self, newline: str | None = None) -> Iterator[str]:
        try:
            # A byte order mark is what spreadsheets put in front of UTF-8.
            with open(self.path, encoding="utf-8-sig", newline=newline) as file:
                yield from file
        except (UnicodeDecodeError, OSError) as error:
            raise HbertError(f"{self.name} cannot be read as UTF-8 text: {error}") from error


class _PlainLines(_File):
    def __iter__(self) -> Iterator[Row]:
        for number, line in enumerate(self._lines(), 1):
            yield Row(number, {TEXT: line.rstrip("\n")})


class _JsonLines(_File):
    def __iter__(self) -> Iterator[Row]:
        for number, line in enumerate(self._lines(), 1):
            if line.strip():
                yield Row(number, self._object(number, line))

    def _object(self, number: int, line: str) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise HbertError(f"{self.name}, line {number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise HbertError(f"{self.name}, line {number}: not a JSON object")
        return value

    def columns(self) -> list[str]:
        return next((list(row.cells) for row in self), [])


class _TableFile(_File):
    def __init__(self, path: Path, names: Sequence[str] | None):
        super().__init__(path)
        self.names = names
        self._what = "--columns" if names is not None else "the header"

    def columns(self) -> list[str]:
        names = next((cells for _, cells in self._records() if cells), None) if self.names is None else list(self.names)
        if names is None:
            raise HbertError(f"{self.name} is empty")
        return names

    def __iter__(self) -> Iterator[Row]:
        names = self.columns()
        records = self._records()
        if self.names is None:
            next(cells for _, cells in records if cells)
        for line, found in records:
            if not found and len(names) > 1:
                continue
            # One column: a blank line is an empty text, and results stay in line with the file.
            cells = found or [""]
            if len(cells) != len(names):
                raise HbertError(
                    f"{self.name}, line {line}: {counted(len(cells), 'cell')}, but {self._what} has "
                    f"{counted(len(names), 'column')} ({_listed(names)})"
                )
            yield Row(line, dict(zip(names, cells, strict=True)))

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """The records, each with the line that it begins in; those of blank lines are empty."""
        csv.field_size_limit(_CELL_CHARACTERS)
        if self.path.suffix.lower() == ".csv":
            reader = csv.reader(self._lines(newline=""), strict=True)
        else:
            reader = csv.reader(self._lines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        begin = 1
        try:
            for cells in reader:
                yield begin, cells
                begin = reader.line_num + 1
        except csv.Error as error:
            raise HbertError(f"{self.name}, line {begin}: {error}") from error


class DatasetRows:
    """A split of a Hugging Face data set: a hub name or a local folder that ``datasets`` loads.

    Raises:
        HbertError: the ``datasets`` library is missing, the data set cannot be loaded, or it has no such
            split.
    """

    unit = "row"

    def __init__(self, name: str, config: str | None, split: str):
        self.name = f"{name} [{split}]"
        found = _load_dataset(name, config)
        if split not in found:
            raise HbertError(f"data set {name!r} has no split {split!r}; it has: {', '.join(found)}")
        self._data = found[split]

    def columns(self) -> list[str]:
        return list(self._data.column_names)

    def declared_labels(self, column: str) -> list[str] | None:
        feature = self._data.features[column]
        return list(names) if (names := getattr(getattr(feature, "feature", feature), "names", None)) else None

    def __iter__(self) -> Iterator[Row]:
        decoders = {column: names for column in self.columns() if (names := self.declared_labels(column))}
        for number, cells in enumerate(self._data, 1):
            for column, names in decoders.items():
                cells[column] = _label_names(cells[column], names)
            yield Row(number, cells)


def _label_names(value: Any, names: list[str]) -> Any:
    """Names of class numbers; -1 is how data sets mark a hidden label."""
    if isinstance(value, list):
        return [_label_names(entry, names) for entry in value]
    return None if value is None or value < 0 else names[value]


def _load_dataset(name: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise HbertError("--dataset needs the datasets library: pip install datasets") from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        # A dozen unrelated types are raised here: not found, offline, ambiguous configuration.
        raise HbertError(f"data set {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
