"""The tables of a run as Markdown, for documents: `python -m bench.report RESULT.csv --markdown`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.report.drawing import RATES, grouped, is_timed
from bench.report.outcome import losses, ratio_text
from bench.report.results import Measurement, Results
from bench.suites.suite import FLOOR_RATIO, PEAK_MEMORY
from hbert.evaluate.summary import markdown


def tables(results: Results) -> str:
    """Two tables for each suite and dtype, as far as there are rows for them.

    Time or rate, ratio to each peer with its interval, rate, times the floor: a line is one candidate of one case; the
    last column counts the undisturbed rounds behind it. Peak memory: a line is a case.
    """
    parts = []
    for (suite, dtype), rows in grouped(results.rows, lambda row: (row.suite, row.dtype)).items():
        if table := _table(rows):
            parts.append(f"{suite}, {dtype}:\n\n{table}")
        if table := _memory_table(rows):
            parts.append(f"{suite}, {dtype}, peak memory, {PEAK_MEMORY.unit}:\n\n{table}")
    return "\n".join(parts)


def brief(results: Results, candidate: str) -> str:
    """One candidate in all cases and dtypes: time or rate, ratio to each peer with its interval; bold: it loses.

    Below it stands why the machine was busy, if it was.
    """
    compared = [row for row in results.comparisons if is_timed(row) and row.candidate == candidate]
    peers = list(dict.fromkeys(row.baseline.split("-")[0] for row in compared))
    lines = []
    for (case, dtype), found in grouped(compared, lambda row: (row.case, row.dtype)).items():
        ratios = {
            row.baseline.split("-")[0]: f"**{ratio_text(row)}**" if row.worse else ratio_text(row) for row in found
        }
        lines.append(
            [f"{case.split('/', 1)[-1]} {dtype}", _median(found[0]), *(ratios.get(peer, "") for peer in peers)]
        )
    table = markdown(["case", f"{candidate}, {compared[0].unit}", *(f"against {peer}" for peer in peers)], lines)
    return "\n".join([table, *(f"*The machine was busy: {reason}.*\n" for reason in results.busy)])


def lost(tables: Mapping[str, Results]) -> str:
    """Every comparison of time or rate that was lost, of results by TABLE-LEVEL: where, by whom to whom, how much."""
    lines = []
    for name, results in tables.items():
        found = losses([row for row in results.comparisons if is_timed(row)])
        lines += [
            [f"{row.case} {row.dtype}", name.rsplit("-", 1)[1], f"{row.candidate} v {row.baseline}", ratio_text(row)]
            for row in found
        ]
    return markdown(["case", "level", "candidate v peer", "ratio"], lines)


def _table(rows: Sequence[Measurement]) -> str:
    compared = [row for row in rows if is_timed(row) and row.is_comparison]
    if not compared:
        return ""
    peers = list(dict.fromkeys(row.baseline for row in compared))
    derived = {(row.case, row.candidate, row.metric): row for row in rows if not is_timed(row)}
    rates = [name for name in RATES if any(row.metric == name for row in rows)]
    columns = [
        "case",
        "candidate",
        compared[0].unit,
        *(f"against {peer}" for peer in peers),
        *_units(rows, rates),
        "x floor",
        "rounds",
    ]
    lines = []
    for (case, candidate), found in grouped(compared, lambda row: (row.case, row.candidate)).items():
        ratios = {row.baseline: ratio_text(row) for row in found}
        more = [_median(derived.get((case, candidate, name))) for name in (*rates, FLOOR_RATIO.name)]
        time, rounds = _median(found[0]), f"{found[0].rounds or 0:g}"
        lines.append([case, candidate, time, *(ratios.get(peer, "") for peer in peers), *more, rounds])
    return markdown(columns, lines)


def _memory_table(rows: Sequence[Measurement]) -> str:
    found = {(row.case, row.candidate): row for row in rows if row.metric == PEAK_MEMORY.name}
    names = list(dict.fromkeys(name for _, name in found))
    cases = dict.fromkeys(case for case, _ in found)
    lines = [[case, *(_median(found.get((case, name))) for name in names)] for case in cases]
    return markdown(["case", *names], lines) if found else ""


def _units(rows: Sequence[Measurement], rates: Sequence[str]) -> list[str]:
    units = {row.metric: row.unit for row in rows}
    return [units[name] for name in rates]


def _median(row: Measurement | None) -> str:
    """Three digits, all of those before the point."""
    return "" if row is None else f"{row.median:.3g}" if row.median < 1000 else f"{row.median:.0f}"
