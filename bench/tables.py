"""The run on the terminal: its header, a table for each suite, and what failed."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from bench.report import Report
from bench.rows import Row
from bench.suites.suite import BANDWIDTH, FLOOR_RATIO, FLOP_RATE

Rows = dict[tuple[str, ...], Row]

_RATES = (BANDWIDTH.name, FLOP_RATE.name)
_BESIDE = (*_RATES, FLOOR_RATIO.name)
_CELLS = (
    "candidate", "median", "p10-p90", "ratio [95%]", "rate", "x floor", "max_err", "rounds (dropped)", "backend",
)
_TEXTS = ("candidate", "backend")


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
    """One line for each peer of a case, with its ratios to all baselines, its rate and its floor ratio."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    beside: Rows = {(*_measured(row), row["metric"]): row for row in rows if row["metric"] in _BESIDE}
    for row in rows:
        if row["metric"] not in _BESIDE:
            lines.setdefault((*_measured(row), row["metric"]), []).append(row)
    units = dict.fromkeys(same[0]["unit"] for same in lines.values())
    columns = _columns(beside)
    table = _headed(f"{suite} ({', '.join(units)})", columns)
    previous = None
    for same in lines.values():
        row = same[0]
        case = (row["case"], row["dtype"])
        cells = _cells(same, beside)
        table.add_row(*(case if case != previous else ("", "")), *(cells[name] for name in columns))
        previous = case
    return table


def _columns(beside: Rows) -> list[str]:
    """What is told of a peer; where there are rates, they take the place of the spread."""
    metrics = {key[-1] for key in beside}
    rates, floors = bool(metrics & set(_RATES)), FLOOR_RATIO.name in metrics
    wanted = {"p10-p90": not rates, "rate": rates, "x floor": floors}
    return [name for name in _CELLS if wanted.get(name, True)]


def _cells(same: list[Row], beside: Rows) -> dict[str, str]:
    row = same[0]
    found = {metric: beside.get((*_measured(row), metric)) for metric in _BESIDE}
    rates = [f"{rate['median']:.3g} {rate['unit']}" for name, rate in found.items() if rate and name in _RATES]
    floor = found[FLOOR_RATIO.name]
    values = (
        row["candidate"], f"{row['median']:.4g}", f"{row['p10']:.4g}-{row['p90']:.4g}",
        "\n".join(map(_ratio_text, same)), "".join(rates), f"{floor['median']:.2f}" if floor else "",
        "-" if row["max_err"] is None else f"{row['max_err']:.1e}", f"{row['rounds']} ({row['dropped']})",
        row["backend"],
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
    """The ratio; coloured when its whole interval lies on one side of 1."""
    if row["ratio"] is None:
        return "-"
    if row["candidate"] == row["baseline"]:
        return "1 (baseline)"
    style = "green" if row["ratio_lo"] > 1 else "red" if row["ratio_hi"] < 1 else "default"
    low, high = row["ratio_lo"], row["ratio_hi"]
    return f"[{style}]{row['ratio']:.2f} \\[{low:.2f}, {high:.2f}] v {row['baseline']}[/]"
