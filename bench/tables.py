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
    table = _columns(suite, list(dict.fromkeys(same[0]["unit"] for same in lines.values())), bool(beside))
    previous = None
    for same in lines.values():
        row = same[0]
        case = (row["case"], row["dtype"])
        table.add_row(*(case if case != previous else ("", "")), *_cells(same, beside))
        previous = case
    return table


def _cells(same: list[Row], beside: Rows) -> list[str]:
    row = same[0]
    return [
        row["candidate"], f"{row['median']:.4g}", *([] if beside else [f"{row['p10']:.4g}-{row['p90']:.4g}"]),
        "\n".join(map(_ratio_text, same)), *(_beside_texts(row, beside) if beside else ()),
        "-" if row["max_err"] is None else f"{row['max_err']:.1e}",
        f"{row['rounds']} ({row['dropped']})", row["backend"],
    ]


def _beside_texts(row: Row, beside: Rows) -> tuple[str, str]:
    found = {metric: beside.get((*_measured(row), metric)) for metric in _BESIDE}
    rates = [f"{rate['median']:.3g} {rate['unit']}" for name, rate in found.items() if rate and name in _RATES]
    floor = found[FLOOR_RATIO.name]
    return "".join(rates), f"{floor['median']:.2f}" if floor else ""


def _columns(suite: str, units: list[str], has_floor: bool) -> Table:
    table = Table(title=f"{suite} ({', '.join(units)})", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("case", overflow="fold")
    for heading in ("dtype", "candidate"):
        table.add_column(heading)
    middle = ("median", "ratio [95%]", "rate", "x floor") if has_floor else ("median", "p10-p90", "ratio [95%]")
    for heading in (*middle, "max_err", "rounds (dropped)"):
        table.add_column(heading, justify="right")
    table.add_column("backend")
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
