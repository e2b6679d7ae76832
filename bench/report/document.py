"""The HTML page of a run, and its figures as PNG files, made from the CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.report.drawing import grouped, is_measured, is_timed, looks
from bench.report.kernel_charts import kernel_drawings
from bench.report.model_charts import model_drawings
from bench.report.outcome import counts, losses, ratio_text, sentence, summary, wins
from bench.report.results import Measurement, Results, read_results
from bench.suites import SUITES
from hbert.data.storage import replacing
from hbert.errors import HbertError
from hbert.reporting import page
from hbert.reporting.page import Cell
from hbert.reporting.style import save_chart

_TITLE = "HBERT benchmark"
_SUMMARY, _READING, _MISSING = "Better and worse", "How to read this", "Not measured"
# Stand open, the others folded.
_FACTS = ("cpu", "cpu_model", "device", "threads", "dtype", "torch", "git", "date", "command")
_RATIO = (
    "The ratio is the time of the peer over that of the candidate, for rates the candidate's over the peer's: above 1 "
    "the candidate is better. It is the median of the ratios within the rounds, in which candidate and peer took "
    "turns, so that a slow moment of the machine hits both; it need not be the ratio of the two medians."
)
_INTERVAL = (
    "In brackets stands its 95% interval over the rounds, of order statistics. A whole interval above 1 is called "
    "better, one below 1 worse, and one that holds 1 no difference. Memory is measured once: its ratio has no "
    "interval, and is a difference above 2%."
)
_SPREAD = (
    "Medians and percentiles are those of the calls. No candidate was timed before its output had been held against "
    "a reference in a wider dtype; the largest error is in the tables. Slices of rounds that other load had disturbed "
    "are dropped, counted and repeated."
)
_NEITHER = "Models have random weights unless the command names a checkpoint: nothing here speaks of quality."


def make_report(path: Path, out: Path | None = None) -> list[str]:
    """Writes the report of a CSV of bench/run.py to `out`, else to a folder of the CSV's name beside it.

    Returns:
        lines for the terminal: wins and losses, and where the page is.

    Raises:
        HbertError: the CSV is not one of bench/run.py, matplotlib is missing, or a file cannot be read or written.
    """
    results = read_results(path)
    try:
        written = _write(results, out or path.with_suffix(""))
    except OSError as error:
        raise HbertError(f"cannot write the report: {error}") from error
    return [*summary(results), f"report: {written}"]


def _write(results: Results, out: Path) -> Path:
    """Writes OUT/index.html and its figures as PNG files, each file complete or not at all, and returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    sections = {_SUMMARY: _outcome_parts(results)}
    if missing := [*results.failures, *results.left_out]:
        sections[_MISSING] = [page.bullets(missing)]
    sections |= _suite_sections(results, out)
    sections[_READING] = [page.paragraph(text) for text in (_RATIO, _INTERVAL, _SPREAD, _NEITHER)]
    parts = [*map(page.note, _notes(results)), page.contents(list(sections)), *_facts(results)]
    parts += [part for title, made in sections.items() for part in (page.heading(title), *made)]
    path = out / "index.html"
    with replacing(path) as temporary:
        temporary.write_text(page.page(_TITLE, parts, _lead(results)), encoding="utf-8")
    return path


def _lead(results: Results) -> str:
    about = results.about
    threads = f"{about['threads']} threads" if "threads" in about else ""
    return " · ".join(filter(None, (about.get("cpu"), threads, about.get("dtype"), about.get("date", "")[:10])))


def _notes(results: Results) -> list[str]:
    """What a reader has to know before reading a number."""
    notes = []
    if not results.rows:
        notes.append("Nothing was measured.")
    notes += [f"The machine was busy: {reason}." for reason in results.busy]
    if results.failures:
        notes.append(f"{_things(len(results.failures), 'candidate or case', 'candidates or cases')} failed; see below.")
    if not results.has_record:
        notes.append(
            f"{results.name} has no JSON file beside it: the command, what failed and what was left out are unknown."
        )
    if "-dirty" in results.about.get("git", ""):
        notes.append("The files that were measured are not those of the revision: it ends in -dirty.")
    return notes


def _facts(results: Results) -> list[str]:
    """The header: machine, versions, command, disturbance; behind a fold what is needed less often."""
    shown = {name: results.about[name] for name in _FACTS if name in results.about}
    more = {name.replace("_", " "): value for name, value in results.about.items() if name not in shown}
    folded = [page.details("More about the run", [page.facts(more)])] if more else []
    return [page.facts(shown | _disturbance(results) | {"made from": results.name}), *folded]


def _disturbance(results: Results) -> dict[str, str]:
    rounds = {int(row.rounds) for row in results.rows if row.rounds is not None and is_timed(row)}
    drift = [row.canary_drift for row in results.rows if row.canary_drift is not None]
    found = {"dropped": f"{_things(results.dropped, 'slice of a round', 'slices of rounds')}, disturbed by other load"}
    if rounds:
        found["rounds"] = f"{' to '.join(map(str, sorted({min(rounds), max(rounds)})))} undisturbed ones behind a row"
    if drift:
        found["drift"] = f"the time of a fixed computation beside the rounds spread by up to {max(drift):.0%} in a case"
    return found


def _things(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _outcome_parts(results: Results) -> list[str]:
    rows = results.comparisons
    parts = [page.paragraph(sentence(rows))]
    if not rows:
        return parts
    by_metric = grouped(rows, lambda row: (row.suite, row.metric))
    lines = [[suite, metric, *map(str, counts(same)), str(len(same))] for (suite, metric), same in by_metric.items()]
    parts.append(page.table(["suite", "metric", "better", "no difference", "worse", "comparisons"], lines, ("metric",)))
    for title, chosen in (("Worse than the peer", losses(rows)), ("Better than the peer", wins(rows))):
        parts += [page.subheading(title), _compared(chosen)] if chosen else []
    return parts


def _compared(rows: Sequence[Measurement]) -> str:
    columns = ["candidate v peer", "ratio [95%]", "suite", "case", "dtype", "metric"]
    lines = [
        [f"{row.candidate} v {row.baseline}", _toned(row, ratio_text(row)), row.suite, row.case, row.dtype, row.metric]
        for row in rows
    ]
    return page.table(columns, lines, columns[2:])


def _toned(row: Measurement, text: str) -> str | Cell:
    return Cell(text, "good") if row.better else Cell(text, "bad") if row.worse else text


def _suite_sections(results: Results, out: Path) -> dict[str, list[str]]:
    look = {has_ops: looks(rows) for has_ops, rows in grouped(results.rows, lambda row: _has_ops(row.suite)).items()}
    stems = Stems()
    sections = {}
    for suite in results.suites:
        rows = results.of(suite)
        drawings = (kernel_drawings if _has_ops(suite) else model_drawings)(rows, look[_has_ops(suite)])
        figures = [
            page.figure(save_chart(one.chart, out, stems.of(f"{suite} {one.title}")), one.title, one.caption)
            for one in drawings
        ]
        sections[f"Suite {suite}"] = [page.figures(figures), *_tables(rows)]
    return sections


def _has_ops(suite: str) -> bool:
    return suite in SUITES and SUITES[suite].has_ops


class Stems:
    """File names of figures: their titles in letters, digits and dashes, no name twice."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def of(self, title: str) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:80]
        number = self._used[stem] = self._used.get(stem, 0) + 1
        return stem if number == 1 else f"{stem}-{number}"


def _tables(rows: Sequence[Measurement]) -> list[str]:
    """What was measured, and behind a fold every row of the CSV with all of its columns."""
    main = [row for row in rows if is_measured(row)]
    names = list(rows[0].cells)
    shared = {name: rows[0].cells[name] for name in names if len({row.cells[name] for row in rows}) == 1}
    varied = [name for name in names if name not in shared]
    same = ", ".join(f"{name} {value}" for name, value in shared.items() if value)
    raw = page.table(varied, [[row.cells[name] for name in varied] for row in rows], varied[1:])
    return [
        _measured(main),
        page.details(f"All {len(rows)} rows of the CSV", [page.paragraph(f"The same in all of them: {same}."), raw]),
    ]


def _measured(rows: Sequence[Measurement]) -> str:
    columns = [
        "case",
        "dtype",
        "candidate",
        "median",
        "unit",
        "against",
        "ratio [95%]",
        "verdict",
        "p10",
        "p90",
        "max error",
        "rounds",
        "dropped",
    ]
    lines = [
        [
            row.case,
            row.dtype,
            row.candidate,
            _number(row.median),
            row.unit,
            row.baseline if row.is_comparison else "",
            *_ratio_cells(row),
            _number(row.p10),
            _number(row.p90),
            *(row.cells.get(name, "") for name in ("max_err", "rounds", "dropped")),
        ]
        for row in rows
    ]
    return page.table(columns, lines, ("dtype", "candidate", "unit", "against", "verdict"))


def _ratio_cells(row: Measurement) -> list[str | Cell]:
    if not row.is_comparison:
        return ["", ""]
    return [ratio_text(row), _toned(row, row.verdict)]


def _number(value: float | None) -> str:
    """Four digits, without the exponent of large numbers."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
