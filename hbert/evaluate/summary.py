"""The figures of a report: one row for each run, as JSON values and as the cells of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hbert.data.ngram import NgramMarks
from hbert.errors import HbertError

from .run_folder import Run

_UNITS = ((1e3, "k"), (1e6, "M"), (1e9, "B"))
Marks = Mapping[tuple[str, str], NgramMarks | HbertError]


@dataclass(frozen=True)
class Row:
    """The outcome of one run; None where unknown, or where the run has not escaped.

    ``loss`` in nats, ``bits`` per masked token; ``tokens_per_second`` over the optimizer steps;
    ``clock_seconds`` (and escape's) on the clock of steps.
    """

    run: str
    arch: str | None
    size: str | None
    seed: int | None
    parameters: int
    budget_seconds: float | None
    step: int
    max_steps: int
    finished: bool
    tokens: int
    clock_seconds: float | None
    tokens_per_second: float | None
    loss: float
    bits: float
    accuracy: float
    escape_step: int | None
    escape_tokens: int | None
    escape_seconds: float | None


def summary_rows(runs: Sequence[Run], marks: Marks) -> list[Row]:
    """Returns a row for each run, in the given order."""
    return [_row(run, marks[run.text_key]) for run in runs]


def warnings_of(runs: Sequence[Run], marks: Marks) -> list[str]:
    """Returns what a reader has to know before comparing the runs, one sentence each."""
    found = []
    if len({run.info.tokenizer for run in runs}) > 1:
        found.append("The runs have different tokenizers: their loss and accuracy are not comparable.")
    if len({run.info.corpus for run in runs}) > 1:
        found.append("The runs have different text: their loss and accuracy are not comparable.")
    counts = {run.last.num_masked for run in runs}
    if len(counts) > 1:
        listed = ", ".join(f"{count:,}" for count in sorted(counts))
        found.append(
            f"The runs were evaluated on different masked tokens ({listed} of them), through another "
            "--eval-blocks or --block-size: their loss and accuracy are not comparable."
        )
    found += [f"No n-gram marks: {reason}." for reason in marks.values() if isinstance(reason, HbertError)]
    if clockless := [run.label for run in runs if run.clock(run.last) is None]:
        found.append(
            f"No curve against the clock of {', '.join(clockless)}: without a budget, the time of a step is "
            "known when the run is finished."
        )
    if unfinished := [run for run in runs if not run.finished]:
        found.append(f"Not finished: {', '.join(map(_progress, unfinished))}.")
    return found


def as_json(runs: Sequence[Run], marks: Marks) -> dict[str, Any]:
    """Returns the whole report as JSON values: rows, curves, marks and warnings."""
    rows = []
    for run, row in zip(runs, summary_rows(runs, marks), strict=True):
        counted = marks[run.text_key]
        curve = [asdict(found) | {"clock_seconds": run.clock(found)} for found in run.evaluations]
        known = asdict(counted) if isinstance(counted, NgramMarks) else None
        rows.append(asdict(row) | {"settings": run.info.settings, "marks": known, "evaluations": curve})
    return _finite({"warnings": warnings_of(runs, marks), "runs": rows})


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and cells of the summary table."""
    columns = {
        "run": [row.run for row in rows],
        "model": [" ".join(filter(None, (row.arch, row.size))) for row in rows],
        "parameters": [_count(row.parameters) for row in rows],
        "accuracy": [_number(row.accuracy, 4) for row in rows],
        "loss, nats": [_number(row.loss, 3) for row in rows],
        "bits": [_number(row.bits, 3) for row in rows],
        "escape step": [_escape(row) for row in rows],
        "steps": [f"{row.step:,}" for row in rows],
        "tokens": [_count(row.tokens) for row in rows],
        "tokens/s": [_count(row.tokens_per_second) for row in rows],
        "clock": [duration(row.clock_seconds) for row in rows],
        "budget": [duration(row.budget_seconds) for row in rows],
    }
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def source_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Returns columns and cells of the newest accuracy of each run (a column each) on each source of text."""
    sources = list(dict.fromkeys(name for run in runs for name in run.last.per_source))
    rows = [
        [name, *(_number(run.last.per_source.get(name, {}).get("accuracy"), 4) for run in runs)] for name in sources
    ]
    return ["source", *(run.label for run in runs)], rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, numbers to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(map(line, (columns, rule, *rows))) + "\n"


def duration(seconds: float | None) -> str:
    """Returns seconds as text in the unit that fits: "45 s", "20.0 min", "3.25 h"; "-" for None."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def _row(run: Run, marks: NgramMarks | HbertError) -> Row:
    last, settings = run.last, run.info.settings
    escape = run.escape(marks.left_bigram) if isinstance(marks, NgramMarks) else None
    return Row(
        run=run.label,
        arch=settings.get("arch"),
        size=settings.get("size"),
        seed=settings.get("seed"),
        parameters=run.info.parameters,
        budget_seconds=settings.get("budget"),
        step=last.step,
        max_steps=run.info.max_steps,
        finished=run.finished,
        tokens=last.tokens,
        clock_seconds=run.clock(last),
        tokens_per_second=last.tokens / last.train_seconds if last.train_seconds else None,
        loss=last.loss,
        bits=last.loss / math.log(2),
        accuracy=last.accuracy,
        escape_step=escape.step if escape else None,
        escape_tokens=escape.tokens if escape else None,
        escape_seconds=run.clock(escape) if escape else None,
    )


def _progress(run: Run) -> str:
    return f"{run.label} (step {run.last.step:,} of {run.info.max_steps:,})"


def _escape(row: Row) -> str:
    if row.escape_step is None:
        return "-"
    when = "" if row.escape_seconds is None else f" ({duration(row.escape_seconds)})"
    return f"{row.escape_step:,}{when}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    if round(value) < 1000:
        return f"{value:.0f}"
    # The unit of what is shown: 999,680 is 1 M.
    size, unit = next((size, unit) for size, unit in _UNITS if size == 1e9 or float(f"{value / size:.3g}") < 1000)
    return f"{value / size:.3g} {unit}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
