"""What the commands show: progress on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPED_WIDTH = 200


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Shows a bar while the block runs and yields ``advance(amount)``; draws nothing without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 text", "2,000 texts"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def output_console() -> Console:
    """Returns a console on stdout that does not wrap tables at 80 columns when stdout is a pipe or a file."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[str] = ()) -> None:
    """Prints a table to stdout: the first column and those named in ``text`` to the left, numbers to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and column not in text else "left")
    for row in rows:
        table.add_row(*row)
    output_console().print(table, markup=False)
