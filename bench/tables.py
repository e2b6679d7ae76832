"""The run on the terminal: its header, a table for each suite, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.compare import Change, Key
from bench.report import Report
from bench.rows import Row
from bench.stats import FASTER, NO_DIFFERENCE, SLOWER, drift
from bench.suites import SUITES
from bench.suites.suite import BANDWIDTH, FLOOR_RATIO, FLOP_RATE

Rows = dict[tuple[str, ...], Row]

_RATES = (BANDWIDTH.name, FLOP_RATE.name)
_BESIDE = (*_RATES, FLOOR_RATIO.name)
_CELLS = ("candidate", "median", "p10-p90", "ratio [95%]", "rate", "x floor", "max_err", "rounds (dropped)", "backend")
_TEXTS = ("candidate", "verdict", "backend")
_STYLES = {FASTER: "green", SLOWER: "red", NO_DIFFERENCE: "default"}


def show(report: Report, console: Console) -> None:
    """Prints the header, a table for each suite, and what failed."""
    header = {**report.about, "dropped": f"{report.dropped} slices of rounds, disturbed by other load"}
    if report.canary:
        header["canary"] = f"{1e3 * median(report.canary):.3g} ms, {drift(report.canary):.0%} from p10 to p90"
    for name, value in header.items():
        console.print(f"[dim]{name + ':':16}[/] {escape(str(value))}", highlight=False, soft_wrap=True)
    for suite in dict.fromkeys(row["suite"] for row in report.rows):
        console.print(_table(suite, [row for row in report.rows if row["suite"] == suite]))
    for reason in report.disturbances():
        console.print(f"[bold yellow]busy[/] {escape(reason)}", highlight=False, soft_wrap=True)
    for peer in report.left_out:
        told = escape(f"{peer.suite}, {peer.peer}: {peer.reason}")
        console.print(f"[yellow]left out[/] {told}", highlight=False, soft_wrap=True)
    for failure in report.failures:
        where = " ".join(filter(None, (failure.suite, failure.case, failure.dtype)))
        told = escape(f"{where}, {failure.peer}: {failure.reason}")
        console.print(f"[bold red]failed[/] {told}", highlight=False, soft_wrap=True)


def show_changes(changes: Sequence[Change], lost: Sequence[Key], old: Path, console: Console) -> None:
    """Prints what has changed since the run of the file `old`, and which of its rows this run has `lost`."""
    for suite, case, candidate, dtype, _ in lost:
        told = escape(f"{suite} {case} {dtype}, {candidate}: only in {old}")
        console.print(f"[yellow]not compared[/] {told}", highlight=False, soft_wrap=True)
    if not changes:
        console.print(f"nothing of this run is in {escape(str(old))}", highlight=False, soft_wrap=True)
        return
    table = _headed(f"against {escape(str(old))} (time of a call)", ["candidate", "before", "now", "change", "verdict"])
    for change in changes:
        suite, case, candidate, dtype, _ = change.key
        style = _STYLES[change.verdict]
        table.add_row(
            escape(f"{suite} {case}"),
            dtype,
            candidate,
            f"{change.old:.4g} {change.unit}",
            f"{change.new:.4g} {change.unit}",
            f"{change.change:+.1%}",
            f"[{style}]{change.verdict}[/]",
        )
    console.print(table)


def _table(suite: str, rows: list[Row]) -> Table:
    """One line for each peer of a case, with its ratios to all baselines, its rate and its floor ratio."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    beside: Rows = {(*_measured(row), row["metric"]): row for row in rows if row["metric"] in _BESIDE}
    for row in rows:
        if row["metric"] not in _BESIDE:
            lines.setdefault((*_measured(row), row["metric"]), []).append(row)
    units = dict.fromkeys(same[0]["unit"] for same in lines.values())
    columns = _columns(beside, SUITES[suite].has_ops)
    table = _headed(f"{suite} ({', '.join(units)})", columns)
    previous = None
    for same in lines.values():
        row = same[0]
        case = (escape(row["case"]), row["dtype"])
        cells = _cells(same, beside)
        table.add_row(*(case if case != previous else ("", "")), *(cells[name] for name in columns))
        previous = case
    return table


def _columns(beside: Rows, ops: bool) -> list[str]:
    """What is told of a peer; the rates of ops take the place of the spread."""
    metrics = {key[-1] for key in beside}
    rates, floors = ops and bool(metrics & set(_RATES)), FLOOR_RATIO.name in metrics
    wanted = {"p10-p90": not rates, "rate": rates, "x floor": floors}
    return [name for name in _CELLS if wanted.get(name, True)]


def _cells(same: list[Row], beside: Rows) -> dict[str, str]:
    row = same[0]
    found = {metric: beside.get((*_measured(row), metric)) for metric in _BESIDE}
    rates = [f"{rate['median']:.3g} {rate['unit']}" for name, rate in found.items() if rate and name in _RATES]
    floor = found[FLOOR_RATIO.name]
    values = (
        row["candidate"],
        f"{row['median']:.4g}",
        f"{row['p10']:.4g}-{row['p90']:.4g}",
        "\n".join(map(_ratio_text, same)),
        "".join(rates),
        f"{floor['median']:.2f}" if floor else "",
        "-" if row["max_err"] is None else f"{row['max_err']:.1e}",
        f"{row['rounds']} ({row['dropped']})",
        escape(row["backend"]),
    )
    return dict(zip(_CELLS, values, strict=True))


def _headed(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("case", overflow="fold")
    table.add_column("dtype")
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXTS else "right")
    return table


def _measured(row: Row) -> tuple[str, str, str]:
    return row["case"], row["dtype"], row["candidate"]


def _ratio_text(row: Row) -> str:
    """The ratio, coloured by its verdict."""
    if row["ratio"] is None:
        return "-"
    if row["candidate"] == row["baseline"]:
        return "1 (baseline)"
    style = _STYLES.get(row["verdict"], "default")
    low, high = row["ratio_lo"], row["ratio_hi"]
    return f"[{style}]{row['ratio']:.2f} \\[{low:.2f}, {high:.2f}] v {row['baseline']}[/]"
