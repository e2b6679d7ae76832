"""The tables of a run as Markdown, for documents: `python -m bench.report RESULT.csv --markdown`."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.drawing import RATES, grouped, is_timed
from bench.report.outcome import ratio_text
from bench.report.results import Measurement, Results
from bench.suites.suite import FLOOR_RATIO
from hbert.evaluate.summary import markdown


def tables(results: Results) -> str:
    """One table for each suite and dtype: time or rate, ratio to each peer with its interval, rate, times the floor.

    A line is one candidate of one case; a last column counts the undisturbed rounds behind it.
    """
    parts = []
    for (suite, dtype), rows in grouped(results.rows, lambda row: (row.suite, row.dtype)).items():
        if table := _table(rows):
            parts.append(f"{suite}, {dtype}:\n\n{table}")
    return "\n".join(parts)


def _table(rows: Sequence[Measurement]) -> str:
    compared = [row for row in rows if is_timed(row) and row.is_comparison]
    if not compared:
        return ""
    peers = list(dict.fromkeys(row.baseline for row in compared))
    derived = {(row.case, row.candidate, row.metric): row for row in rows if not is_timed(row)}
    rates = [name for name in RATES if any(row.metric == name for row in rows)]
    columns = ["case", "candidate", compared[0].unit, *(f"against {peer}" for peer in peers), *_units(rows, rates),
               "x floor", "rounds"]
    lines = []
    for (case, candidate), found in grouped(compared, lambda row: (row.case, row.candidate)).items():
        ratios = {row.baseline: ratio_text(row) for row in found}
        more = [_median(derived.get((case, candidate, name))) for name in (*rates, FLOOR_RATIO.name)]
        time, rounds = f"{found[0].median:.3g}", f"{found[0].rounds or 0:g}"
        lines.append([case, candidate, time, *(ratios.get(peer, "") for peer in peers), *more, rounds])
    return markdown(columns, lines)


def _units(rows: Sequence[Measurement], rates: Sequence[str]) -> list[str]:
    units = {row.metric: row.unit for row in rows}
    return [units[name] for name in rates]


def _median(row: Measurement | None) -> str:
    return "" if row is None else f"{row.median:.3g}"
