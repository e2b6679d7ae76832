"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from hbert.data.terminal import output_console


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table to stdout, the first column to the left and the others to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    output_console().print(table, markup=False)
