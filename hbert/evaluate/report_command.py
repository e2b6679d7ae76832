"""``hbert report``: curves and tables of training runs, from their run folders alone."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hbert.data.ngram import NgramMarks
from hbert.data.storage import replacing, write_json
from hbert.data.terminal import output_console, print_table
from hbert.errors import HbertError
from hbert.reporting import page
from hbert.reporting.lines import Line, LineChart
from hbert.reporting.style import Series, save_chart

from . import summary
from .marks import DRAWN, marks_of
from .run_folder import Run, read_runs

AXES = ("steps", "tokens", "clock")
METRICS = {"accuracy": "held-out accuracy", "loss": "held-out loss, nats per masked token"}
# The page has all columns; a terminal of 100 characters has room for these.
_PRINTED = ("run", "accuracy", "loss, nats", "escape step", "tokens", "tokens/s", "clock")
_CLOCK_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_CAPTION = "One line for each run; a dot where it first is above the left-bigram mark."
_READING = (
    "Accuracy is the share of masked held-out tokens whose most likely prediction is right. The clock is the "
    "number of steps times one time of a step: that of the calibration, so that other load on the machine changes no "
    "curve, or, for a run without a calibration (--max-steps), the median of its own steps. "
    "Escape: the first evaluation whose accuracy is above the left-bigram mark. The marks are the accuracy of "
    "counting models on the same held-out text with every other token visible; they are counted on the training "
    "tokens of the runs."
)


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("report", help=summary, description=summary)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders written by hbert pretrain")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder to write (default: report)")
    parser.add_argument(
        "--x", nargs="+", choices=AXES, default=list(AXES), help="what to draw against (default: all three)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    runs = _evaluated(read_runs(args.runs))
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_report(runs, marks_of(runs, out), out, args.x)
    except OSError as error:
        raise HbertError(f"cannot write the report to {out}: {error}") from error
    output_console().print(f"written to {out / 'index.html'}", markup=False)


def _evaluated(runs: Sequence[Run]) -> list[Run]:
    """The runs that have an evaluation; the others are named on stderr."""
    found = [run for run in runs if run.evaluations]
    if not found:
        raise HbertError(f"{', '.join(str(run.path) for run in runs)}: no evaluation yet, nothing to report")
    for run in runs:
        if not run.evaluations:
            print(f"hbert: warning: {run.path} has no evaluation yet and is left out", file=sys.stderr)
    return found


def write_report(runs: Sequence[Run], marks: summary.Marks, out: Path, axes: Sequence[str]) -> None:
    """Writes index.html, summary.json, summary.md and the charts (METRIC-AXIS.png, ...-dark.png).

    Raises:
        OSError: a file cannot be written.
    """
    warnings = summary.warnings_of(runs, marks)
    rows = summary.summary_rows(runs, marks)
    columns, cells = summary.table(rows)
    parts = [page.note(warning) for warning in warnings]
    parts += [page.table(columns, cells, ("model",)), *_chart_parts(runs, marks, out, axes)]
    parts += _mark_parts(runs, marks)
    parts += [page.heading("Accuracy by source"), page.table(*summary.source_table(runs))]
    parts += [page.heading("How to read this"), page.paragraph(_READING)]
    write_json(out / "summary.json", summary.as_json(runs, marks))
    _write(out / "summary.md", summary.markdown(columns, cells) + "".join(f"\n{text}\n" for text in warnings))
    _write(out / "index.html", page.page("Pretraining runs", parts))
    _print(columns, cells, warnings)


def charts(runs: Sequence[Run], marks: summary.Marks, axes: Sequence[str]) -> dict[str, LineChart]:
    """Returns the charts by file stem, accuracy first. Marks are drawn where one set of marks fits all runs."""
    shared = marks[runs[0].text_key] if len(marks) == 1 else None
    heights = {
        f"{label} {getattr(shared, name):.3f}": getattr(shared, name)
        for name, label in DRAWN.items()
        if isinstance(shared, NgramMarks)
    }
    unit, seconds = _clock_unit(runs)
    labels = {"steps": "steps", "tokens": "training tokens", "clock": f"clock, {unit}"}
    return {
        f"{metric}-{axis}": LineChart(
            labels[axis],
            label,
            [
                Line(
                    Series(run.label, colour),
                    _positions(run, axis, seconds),
                    _values(run, metric),
                    dots=_escape(run, marks[run.text_key]),
                )
                for colour, run in enumerate(runs)
            ],
            heights if metric == "accuracy" else {},
        )
        for metric, label in METRICS.items()
        for axis in axes
    }


def _escape(run: Run, marks: NgramMarks | HbertError) -> list[int]:
    """Which of the evaluations is the first above the left-bigram mark, where that is known and there is one."""
    found = run.escape(marks.left_bigram) if isinstance(marks, NgramMarks) else None
    return [] if found is None else [run.evaluations.index(found)]


def _positions(run: Run, axis: str, clock_unit: float) -> list[float]:
    """Where the evaluations stand on an axis; not a number where there is no clock."""
    if axis == "clock":
        clock = [run.clock(found) for found in run.evaluations]
        return [math.nan if seconds is None else seconds / clock_unit for seconds in clock]
    return [getattr(found, {"steps": "step", "tokens": "tokens"}[axis]) for found in run.evaluations]


def _values(run: Run, metric: str) -> list[float]:
    return [getattr(found, metric) for found in run.evaluations]


def _clock_unit(runs: Sequence[Run]) -> tuple[str, float]:
    longest = max(run.clock(run.last) or 0.0 for run in runs)
    return next(((name, size) for name, size in _CLOCK_UNITS if longest >= 2 * size), _CLOCK_UNITS[-1])


def _chart_parts(runs: Sequence[Run], marks: summary.Marks, out: Path, axes: Sequence[str]) -> list[str]:
    figures = []
    for stem, chart in charts(runs, marks, axes).items():
        title = f"{chart.y_label[0].upper()}{chart.y_label[1:]} against {chart.x_label}"
        figures.append(page.figure(save_chart(chart, out, stem), title, _CAPTION))
    return [page.heading("Curves"), page.figures(figures)]


def _mark_parts(runs: Sequence[Run], marks: summary.Marks) -> list[str]:
    counted = {key: found for key, found in marks.items() if isinstance(found, NgramMarks)}
    if not counted:
        return []
    rows = []
    for key, found in counted.items():
        labels = ", ".join(run.label for run in runs if run.text_key == key)
        rows.append([labels, *(f"{getattr(found, name):.4f}" for name in DRAWN), f"{found.predictions:,}"])
    columns = ["runs", *DRAWN.values(), "predictions"]
    return [page.heading("n-gram marks: accuracy of counting models"), page.table(columns, rows)]


def _print(columns: Sequence[str], cells: Sequence[Sequence[str]], warnings: Sequence[str]) -> None:
    shown = [index for index, column in enumerate(columns) if column in _PRINTED]
    print_table([columns[index] for index in shown], [[row[index] for index in shown] for row in cells])
    for warning in warnings:
        output_console().print(warning, markup=False)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
