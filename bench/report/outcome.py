"""Where a run's candidates did better than their peers and where worse: counts, and every case by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.report.drawing import grouped
from bench.report.results import Measurement, Results
from bench.suites.suite import PEAK_MEMORY

_MOST = {"better": 3, "worse": 8}  # lines of a suite on the terminal; the page has them all


def wins(rows: Sequence[Measurement]) -> list[Measurement]:
    """Comparisons whose whole interval is above 1, by suite and metric, the largest ratio first."""
    return _ordered(rows, lambda row: row.better, -1)


def losses(rows: Sequence[Measurement]) -> list[Measurement]:
    """Comparisons whose whole interval is below 1, by suite and metric, the smallest ratio first."""
    return _ordered(rows, lambda row: row.worse, 1)


def _ordered(rows: Sequence[Measurement], chosen: Callable[[Measurement], bool], sign: int) -> list[Measurement]:
    by_metric = grouped(rows, lambda row: (row.suite, row.metric)).values()
    return [row for same in by_metric for row in sorted(filter(chosen, same), key=lambda row: sign * (row.ratio or 0))]


def counts(rows: Sequence[Measurement]) -> tuple[int, int, int]:
    """How many comparisons are better, without a difference, and worse."""
    better, worse = len(wins(rows)), len(losses(rows))
    return better, len(rows) - better - worse, worse


def sentence(rows: Sequence[Measurement]) -> str:
    """The counts in words."""
    if not rows:
        return "Nothing was compared: no candidate was measured together with a peer."
    better, same, worse = counts(rows)
    return f"Of {len(rows)} comparisons {better} are better, {worse} worse, and {same} show no difference."


def ratio_text(row: Measurement) -> str:
    """Ratio and interval; memory is measured once and has none."""
    if row.ratio is None:
        return ""
    if row.ratio_lo is None or row.ratio_hi is None or row.metric == PEAK_MEMORY.name:
        return _short(row.ratio)
    return f"{_short(row.ratio)} [{_short(row.ratio_lo)}, {_short(row.ratio_hi)}]"


def _short(ratio: float) -> str:
    """Two decimals; of small ratios two digits."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def summary(results: Results) -> list[str]:
    """Lines for the terminal: the counts, then wins and losses by name, as many of a suite as fit."""
    rows = results.comparisons
    lines = [sentence(rows)]
    for word, chosen in (("better", wins(rows)), ("worse", losses(rows))):
        for found in grouped(chosen, lambda row: (row.suite, row.metric)).values():
            lines += [_line(word, row) for row in found[: _MOST[word]]]
            if (more := len(found) - _MOST[word]) > 0:
                lines.append(f"  {word:8} and {more} more of {found[0].suite}, {found[0].metric}")
    failed = len(results.failures)
    return lines + ([f"  failed   {failed} of the candidates or cases; the report names them"] if failed else [])


def _line(word: str, row: Measurement) -> str:
    return f"  {word:8} {row.candidate} v {row.baseline}, {row.suite} {row.place}: {row.metric} {ratio_text(row)}"
