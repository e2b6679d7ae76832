"""What comes out: rows in one long form, the CSV and JSON files, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import Failure, Result
from bench.stats import Ratio, paired_ratio, spread
from bench.suites import SUITES, Metric

COLUMNS = (
    "suite", "case", "candidate", "baseline", "dtype", "batch", "seq", "metric", "unit", "median", "p10", "p90", "p99",
    "ratio", "ratio_lo", "ratio_hi", "max_err", "rounds", "dropped", "threads", "isa", "backend", "torch", "cpu", "git",
    "date",
)
Row = dict[str, Any]


@dataclass
class Report:
    """Everything that a run found. `about` is the header, `rows` have the keys `COLUMNS`."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0

    def add(self, result: Result, candidates: Sequence[str], baselines: Sequence[str]) -> None:
        """Takes in one case: a row for each baseline, and for each candidate one against every baseline."""
        case = result.case
        present = [peer for peer in baselines if peer in result.gates]
        pairs = [(peer, peer) for peer in present]
        pairs += [(ours, peer) for ours in candidates if ours in result.gates for peer in present or [""]]
        self.rows += [self._row(result, *pair) for pair in pairs]
        self.failures += result.failures
        self.dropped += result.dropped
        self.rounds += [
            {"suite": case.suite, "case": case.name, "dtype": case.dtype, "round": number,
             "peers": {peer: asdict(part) for peer, part in done.items()}}
            for number, done in enumerate(result.rounds)
        ]

    def _row(self, result: Result, candidate: str, baseline: str) -> Row:
        case, metric = result.case, SUITES[result.case.suite].metric
        values = spread([metric.value(s, case.work) for done in result.rounds for s in done[candidate].seconds])
        ratio = _ratio(result, metric, candidate, baseline) if baseline else None
        about = self.about
        return dict(zip(COLUMNS, (
            case.suite, case.name, candidate, baseline, case.dtype, case.batch, case.seq, metric.name, metric.unit,
            values.median, values.p10, values.p90, values.p99,
            ratio and ratio.value, ratio and ratio.low, ratio and ratio.high,
            result.gates[candidate].error, len(result.rounds), result.dropped, about["threads"],
            result.traits[candidate]["isa"], result.traits[candidate]["backend"],
            about["torch"], about["cpu"], about["git"], about["date"],
        ), strict=True))


def _ratio(result: Result, metric: Metric, candidate: str, baseline: str) -> Ratio:
    """Above 1 the candidate is better: baseline / candidate for times, candidate / baseline for rates."""
    work = result.case.work
    ours, theirs = (
        [metric.value(done[peer].typical, work) for done in result.rounds] for peer in (candidate, baseline)
    )
    return paired_ratio(ours, theirs) if metric.per_second else paired_ratio(theirs, ours)


def check_writable(folder: Path) -> None:
    """Makes the result folder, and a file in it, before hours are measured.

    Raises:
        OSError: it cannot be made, or nothing can be written to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def save(report: Report, folder: Path, stem: str) -> list[Path]:
    """Writes STEM.csv and STEM.json, each complete or not at all, and returns their paths."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in report.rows)
    texts = {f"{stem}.csv": table.getvalue(), f"{stem}.json": json.dumps(asdict(report), indent=1) + "\n"}
    return [_replace(folder / name, text) for name, text in texts.items()]


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _replace(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def show(report: Report, console: Console) -> None:
    """Prints the header, a table for each suite, and what failed."""
    dropped = f"{report.dropped} slices of rounds, disturbed by other load"
    for name, value in {**report.about, "dropped": dropped}.items():
        console.print(f"[dim]{name + ':':16}[/] {value}", highlight=False, soft_wrap=True)
    for suite in dict.fromkeys(row["suite"] for row in report.rows):
        console.print(_table(suite, [row for row in report.rows if row["suite"] == suite]))
    for failure in report.failures:
        where = " ".join(filter(None, (failure.suite, failure.case, failure.dtype)))
        console.print(f"[bold red]failed[/] {where}, {failure.peer}: {failure.reason}", highlight=False, soft_wrap=True)


def _table(suite: str, rows: list[Row]) -> Table:
    unit = rows[0]["unit"]
    table = Table(title=f"{suite} ({unit})", title_justify="left", title_style="bold")
    for heading in ("case", "dtype", "candidate"):
        table.add_column(heading)
    for heading in ("median", "p10-p90", "ratio [95%]", "max_err", "rounds (dropped)"):
        table.add_column(heading, justify="right")
    table.add_column("backend")
    previous = None
    for row in rows:
        case = (row["case"], row["dtype"])
        if previous not in (None, case):
            table.add_section()
        previous = case
        table.add_row(
            *case, row["candidate"], f"{row['median']:.4g}", f"{row['p10']:.4g}-{row['p90']:.4g}", _ratio_text(row),
            f"{row['max_err']:.1e}", f"{row['rounds']} ({row['dropped']})", row["backend"],
        )
    return table


def _ratio_text(row: Row) -> str:
    """The ratio; coloured when its whole interval lies on one side of 1."""
    if row["ratio"] is None:
        return "-"
    if row["candidate"] == row["baseline"]:
        return "1 (baseline)"
    style = "green" if row["ratio_lo"] > 1 else "red" if row["ratio_hi"] < 1 else "default"
    low, high = row["ratio_lo"], row["ratio_hi"]
    return f"[{style}]{row['ratio']:.2f} \\[{low:.2f}, {high:.2f}] v {row['baseline']}[/]"
