"""What the figures of all suites share: a figure with its words, names and their colours, rows without repetition."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.harness import is_floor
from bench.report.results import Measurement
from bench.suites.suite import BANDWIDTH, FLOOR_RATIO, FLOP_RATE, PEAK_MEMORY
from hbert.reporting.rows import Point
from hbert.reporting.style import Chart, Series

RATES = (BANDWIDTH.name, FLOP_RATE.name)
_DERIVED = (*RATES, FLOOR_RATIO.name)  # from the seconds that another metric tells
SPREAD = "Whiskers: 10th to 90th percentile of the calls."
_INTERVAL = "Whiskers: 95% interval of the median over the rounds."
_Key = TypeVar("_Key", bound=Hashable)
Looks = Mapping[str, Series]


@dataclass(frozen=True)
class Drawing:
    """A chart, what it shows, and how to read it."""

    chart: Chart
    title: str
    caption: str


def looks(rows: Sequence[Measurement]) -> dict[str, Series]:
    """One look for each name in all figures; ours come first, for the colours that are told apart best."""
    peers = {row.candidate for row in rows if row.candidate == row.baseline}
    names = dict.fromkeys(row.candidate for row in rows if not is_floor(row.candidate))
    ordered = sorted(names, key=lambda name: name in peers)
    return {name: Series(name, colour, peer=name in peers) for colour, name in enumerate(ordered)}


def is_measured(row: Measurement) -> bool:
    """Whether a row has a metric that was measured, and not one derived from it."""
    return row.metric not in _DERIVED


def is_timed(row: Measurement) -> bool:
    """Whether a row has its suite's own metric, from rounds of calls."""
    return is_measured(row) and row.metric != PEAK_MEMORY.name


def once(rows: Iterable[Measurement]) -> list[Measurement]:
    """One row for each measurement: the CSV repeats a candidate's for every baseline."""
    found: dict[tuple[str, ...], Measurement] = {}
    for row in rows:
        found.setdefault((row.suite, row.case, row.dtype, row.candidate, row.metric), row)
    return list(found.values())


def grouped(rows: Iterable[Measurement], key: Callable[[Measurement], _Key]) -> dict[_Key, list[Measurement]]:
    """Rows by key, both in the order of the file."""
    found: dict[_Key, list[Measurement]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def point(row: Measurement, look: Series, limit: bool = False) -> Point:
    """A measurement with the interval of its median, if it has one, else with the spread of its calls."""
    low, high = (row.p10, row.p90) if row.median_lo is None else (row.median_lo, row.median_hi)
    return Point(look, row.median, low, high, limit)


def whiskers(rows: Iterable[Measurement]) -> str:
    """What the whiskers of such points are."""
    return SPREAD if any(row.median_lo is None for row in rows) else _INTERVAL
