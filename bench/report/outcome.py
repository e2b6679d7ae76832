"""Where a run's candidates did better than their peers and where worse: counts, and every case by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from bench.report.results import Measurement, Results

_MOST = {"better": 3, "worse": 8}  # lines of a suite on the terminal; the page has them all


def wins(rows: Iterable[Measurement]) -> list[Measurement]:
    """Comparisons whose whole interval is above 1, by suite, the largest ratio first."""
    return sorted((row for row in rows if row.better), key=lambda row: (row.suite, row.metric, -(row.ratio or 0)))


def losses(rows: Iterable[Measurement]) -> list[Measurement]:
    """Comparisons whose whole interval is below 1, by suite, the smallest ratio first."""
    return sorted((row for row in rows if row.worse), key=lambda row: (row.suite, row.metric, row.ratio or 0))


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
    if row.ratio_lo is None or row.ratio_hi is None or row.ratio_lo == row.ratio_hi:
        return f"{row.ratio:.2f}"
    return f"{row.ratio:.2f} [{row.ratio_lo:.2f}, {row.ratio_hi:.2f}]"


def summary(results: Results) -> list[str]:
    """Lines for the terminal: the counts, then wins and losses by name, as many of a suite as fit, and failures."""
    rows = results.comparisons
    lines = [sentence(rows)]
    for word, chosen in (("better", wins(rows)), ("worse", losses(rows))):
        for _, same in groupby(chosen, key=lambda row: (row.suite, row.metric)):
            found = list(same)
            lines += [_line(word, row) for row in found[:_MOST[word]]]
            if more := len(found) - _MOST[word]:
                lines += [f"  {word:8} and {more} more in {found[0].suite}"] if more > 0 else []
    return lines + [f"  failed   {failure}" for failure in results.failures]


def _line(word: str, row: Measurement) -> str:
    return f"  {word:8} {row.candidate} v {row.baseline}, {row.suite} {row.place}: {row.metric} {ratio_text(row)}"
