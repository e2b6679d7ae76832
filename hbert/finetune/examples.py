"""Labelled texts of a split, checked before anything is trained on them, and the label set of a task."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbert.errors import HbertError

from .rows import Row, Rows, check_column

_NAMED = 20  # labels that a message lists
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """Where text, an optional second text and the label stand; ``separator`` parts the labels of one text.

    ``separator`` None: each text has exactly one label.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    separator: str | None = None


@dataclass(frozen=True)
class Examples:
    """The labelled texts of a split.

    Attributes:
        name, unit: of the rows that they were read from, for messages.
        texts, pairs: first and second texts; ``pairs`` is None where there is one text a row.
        labels: the labels of each text; one each, but for multi-label tasks.
        lines: where each text stands.
    """

    name: str
    unit: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[tuple[str, ...]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def place(self, index: int) -> str:
        """Where an example stands, for messages."""
        return f"{self.name}, {self.unit} {self.lines[index]}"


def read_examples(rows: Rows, columns: Columns) -> Examples:
    """Reads a split.

    Raises:
        HbertError: a column is missing or there twice, there are no rows, a text is empty, or a label is missing or
            malformed; the message names the line.
    """
    for column, flag in ((columns.text, "--text-column"), (columns.label, "--label-column")):
        check_column(rows, column, flag)
    if columns.pair is not None:
        check_column(rows, columns.pair, "--text-pair-column")
    found = Examples(rows.name, rows.unit, [], None if columns.pair is None else [], [], [])
    for row in rows:
        found.texts.append(cell_text(rows, row, columns.text))
        if found.pairs is not None and columns.pair is not None:
            found.pairs.append(cell_text(rows, row, columns.pair))
        found.labels.append(_cell_labels(rows, row, columns))
        found.lines.append(row.line)
    if not found.texts:
        raise HbertError(f"{rows.name} has no rows")
    _check_not_empty(found)
    return found


def cell_text(rows: Rows, row: Row, column: str) -> str:
    """Returns the text in a cell.

    Raises:
        HbertError: there is none, it is not a string, or it has half of a surrogate pair, as JSON may.
    """
    value = row.cells.get(column)
    if not isinstance(value, str):
        what = f"{column!r} is not a text but {_shown(value)}" if column in row.cells else f"no {column!r}"
    elif half := _HALF_PAIR.search(value):
        what = f"{column!r} has {half[0]!a}, half of a surrogate pair, which is no character"
    else:
        return value
    raise HbertError(f"{rows.name}, {rows.unit} {row.line}: {what}")


def _check_not_empty(examples: Examples) -> None:
    texts, pairs = examples.texts, examples.pairs or examples.texts
    empty = [i for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)) if not (text.strip() and pair.strip())]
    if empty:
        count = "an empty text" if len(empty) == 1 else f"{len(empty)} empty texts, the first"
        raise HbertError(f"{examples.place(empty[0])}: {count}; remove such rows")


def _cell_labels(rows: Rows, row: Row, columns: Columns) -> tuple[str, ...]:
    value, separator = row.cells.get(columns.label), columns.separator
    place = f"{rows.name}, {rows.unit} {row.line}: "
    # NaN is how tables of numbers mark a missing cell.
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise HbertError(f"{place}no {columns.label!r}")
    if separator is None and isinstance(value, list):
        raise HbertError(f"{place}{columns.label!r} is a list; lists of labels need --multi-label")
    if separator is not None and isinstance(value, str):
        value = [part for part in value.split(separator) if part.strip()]
    names = [_label_name(place, entry) for entry in (value if isinstance(value, list) else [value])]
    if separator is not None and any(separator in name for name in names):
        raise HbertError(f"{place}a label contains {separator!r}; choose another --label-separator")
    # A label that is named twice for one text counts once.
    return tuple(dict.fromkeys(names))


def _label_name(place: str, value: Any) -> str:
    """Labels are strings; integers and truth values of JSON are taken by their JSON form, so that 1 is "1"."""
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        value = _whole(place, value)
    name = str(value).strip() if isinstance(value, str | int) else ""
    if not name or not name.isprintable():
        raise HbertError(f"{place}the label must be a name in one line, or an integer, not {_shown(value)}")
    return name


def _whole(place: str, value: float) -> int:
    """The integer that a table of floats holds as 1.0: a column of integers with a gap becomes one."""
    if not value.is_integer():
        raise HbertError(f"{place}the label is {value!r}, but labels are classes, not numbers to regress")
    return int(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


@dataclass(frozen=True)
class LabelSet:
    """The labels of a task in the order of the model's outputs."""

    names: tuple[str, ...]
    multi: bool

    @classmethod
    def collect(cls, train: Examples, declared: Sequence[str] | None, multi: bool) -> LabelSet:
        """Takes the labels that the data set declares, else those of the training split.

        These are in order: numbers by value, other names by the alphabet.

        Raises:
            HbertError: there are fewer than two (multi-label: none).
        """
        found = {name for names in train.labels for name in names}
        names = tuple(declared or sorted(found, key=_by_number_or_name))
        if len(found) < (1 if multi else 2):
            only = f"only the label {names[0]!r}" if found else "no label"
            raise HbertError(f"{train.name} has {only}: there is nothing to tell apart")
        return cls(names, multi)

    def encode(self, examples: Examples) -> np.ndarray:
        """Returns int64 class numbers [N], or float32 zeros and ones [N, L] of a multi-label task.

        Raises:
            HbertError: a label that is not in the set; the message names the line.
        """
        numbers = {name: number for number, name in enumerate(self.names)}
        for index, names in enumerate(examples.labels):
            if unknown := [name for name in names if name not in numbers]:
                raise HbertError(
                    f"{examples.place(index)}: the label {unknown[0]!r} is not one of the training split: "
                    f"{shortened(self.names)}"
                )
        if not self.multi:
            return np.array([numbers[names[0]] for names in examples.labels], np.int64)
        encoded = np.zeros((len(examples), len(self.names)), np.float32)
        for index, names in enumerate(examples.labels):
            encoded[index, [numbers[name] for name in names]] = 1
        return encoded


def shortened(names: Iterable[str]) -> str:
    """Joins names with commas, the first of them where they are many."""
    names = list(names)
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _by_number_or_name(name: str) -> tuple[bool, float, str]:
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    # "nan" is a name, too: as a number it would have no place in the order.
    return (False, number, name) if math.isfinite(number) else (True, 0.0, name)
