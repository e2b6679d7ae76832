"""A CSV of bench/run.py, read back and checked; its header and failures from the JSON file beside it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import is_floor
from bench.stats import FASTER, NO_DIFFERENCE, SLOWER
from bench.suites.suite import FLOOR_RATIO, PEAK_MEMORY
from hbert.errors import HbertError

_TEXTS = ("suite", "case", "candidate", "baseline", "dtype", "metric", "unit")
_NEEDED = (*_TEXTS, "batch", "seq", "median")
_NUMBERS = (
    "p10",
    "p90",
    "median_lo",
    "median_hi",
    "ratio",
    "ratio_lo",
    "ratio_hi",
    "rounds",
    "dropped",
    "canary_drift",
)
# Memory is measured once: smaller differences are noise.
_SAME_MEMORY = 0.02
_OF_THE_RUN = ("cpu", "cpu_model", "device", "threads", "torch", "heap_kept", "isa", "git", "date")


@dataclass(frozen=True)
class Measurement:
    """A row of the CSV: one metric of one candidate, against one baseline. `cells` is the whole line.

    Numbers that the line does not have are None. A ratio above 1 says that the candidate is better.
    """

    suite: str
    case: str
    candidate: str
    baseline: str
    dtype: str
    batch: int
    seq: int
    metric: str
    unit: str
    median: float
    p10: float | None
    p90: float | None
    median_lo: float | None
    median_hi: float | None
    ratio: float | None
    ratio_lo: float | None
    ratio_hi: float | None
    rounds: float | None
    dropped: float | None
    canary_drift: float | None
    cells: Mapping[str, str]

    @property
    def is_comparison(self) -> bool:
        """Whether the row says how a candidate of ours does against a peer."""
        floor = self.metric == FLOOR_RATIO.name or is_floor(self.baseline)
        return self.ratio is not None and self.baseline not in ("", self.candidate) and not floor

    @property
    def better(self) -> bool:
        """Whether the whole interval of the ratio is above 1; of memory, clearly above."""
        return self.ratio_lo is not None and self.ratio_lo > 1 + self._slack

    @property
    def worse(self) -> bool:
        """Whether the whole interval of the ratio is below 1; of memory, clearly below."""
        return self.ratio_hi is not None and self.ratio_hi < 1 - self._slack

    @property
    def _slack(self) -> float:
        return _SAME_MEMORY if self.metric == PEAK_MEMORY.name else 0.0

    @property
    def verdict(self) -> str:
        """What the interval of the ratio says; memory, measured once, has none."""
        words = (FASTER, SLOWER, NO_DIFFERENCE)
        if self.metric == PEAK_MEMORY.name:
            words = ("less", "more", "the same")
        return words[0] if self.better else words[1] if self.worse else words[2]

    @property
    def kind(self) -> str:
        """The case without its shape: those of one kind differ in batch and length alone."""
        shape = f"{self.batch}x{self.seq}"
        return "/".join(part for part in self.case.split("/") if part != shape)

    @property
    def place(self) -> str:
        """Case and dtype, as headings have them."""
        return f"{self.case}, {self.dtype}"


@dataclass(frozen=True)
class Results:
    """A file of results: rows, header, slices dropped; in words what was not measured, and why the machine was busy."""

    name: str
    rows: list[Measurement]
    about: dict[str, str]
    dropped: int
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    has_record: bool = True

    @property
    def suites(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(row.suite for row in self.rows))

    @property
    def comparisons(self) -> list[Measurement]:
        """The rows that hold a candidate against a peer."""
        return [row for row in self.rows if row.is_comparison]

    def of(self, suite: str) -> list[Measurement]:
        """The rows of a suite."""
        return [row for row in self.rows if row.suite == suite]


def read_results(path: Path) -> Results:
    """Reads a CSV of bench/run.py. Columns that it does not have are empty; those that are not known are kept.

    The command, the failures and what was left out stand in the JSON file of the same name, where there is one.

    Raises:
        HbertError: a file cannot be read, or the CSV is not one of bench/run.py.
    """
    lines = _lines(path)
    rows = [_measurement(path, number, line) for number, line in enumerate(lines, 2)]
    record = _record(path.with_suffix(".json"))
    about = {name: _values(row.cells.get(name, "") for row in rows) for name in _OF_THE_RUN}
    about |= {name: _text(value) for name, value in record.get("about", {}).items()}
    about["dtype"] = _values(row.dtype for row in rows)
    try:
        failures = [_failure(entry) for entry in record.get("failures", [])]
        left_out = [_failure(entry) for entry in record.get("left_out", [])]
        busy = [str(reason) for reason in record.get("disturbances", [])]
        dropped = _dropped(rows, record)
    except (KeyError, TypeError, ValueError) as error:
        raise HbertError(f"{path.with_suffix('.json')} is not a JSON file of bench/run.py: {error!r}") from error
    known = {name: value for name, value in about.items() if value}
    return Results(path.name, rows, known, dropped, failures, left_out, busy, bool(record))


def _lines(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            names, lines = reader.fieldnames or (), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise HbertError(f"cannot read {path}: {error}") from error
    if missing := [name for name in _NEEDED if name not in names]:
        raise HbertError(f"{path} is not a CSV of bench/run.py: it has no column {', '.join(missing)}")
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise HbertError(f"{path}, line {number}: not as many cells as there are columns")
    return lines


def _measurement(path: Path, line: int, cells: dict[str, str]) -> Measurement:
    def number(name: str) -> float | None:
        text = cells.get(name, "")
        try:
            value = float(text) if text else None
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise HbertError(f"{path}, line {line}: {text!r} in column {name} is not a number")
        return value

    def needed(name: str) -> float:
        value = number(name)
        if value is None:
            raise HbertError(f"{path}, line {line}: column {name} is empty")
        return value

    return Measurement(
        **{name: cells[name] for name in _TEXTS},
        **{name: number(name) for name in _NUMBERS},
        batch=int(needed("batch")),
        seq=int(needed("seq")),
        median=needed("median"),
        cells=cells,
    )


def _record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HbertError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("about"), dict):
        raise HbertError(f"{path} is not a JSON file of bench/run.py")
    return record


def _dropped(rows: list[Measurement], record: Mapping[str, Any]) -> int:
    """Of all cases; the CSV knows only of those that have rows, which all have the number of their case."""
    of_rows = {(row.suite, row.place): int(row.dropped or 0) for row in rows}
    return int(record.get("dropped", sum(of_rows.values())))


def _failure(entry: Mapping[str, str]) -> str:
    """What failed or was left out, and why."""
    where = " ".join(filter(None, (entry["suite"], entry["case"], entry["dtype"])))
    return f"{where}, {entry['peer']}: {entry['reason']}"


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str) or not isinstance(value, Iterable) else ", ".join(map(str, value))


def _values(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, texts)))
