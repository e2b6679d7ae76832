"""Progress on the standard error, silent between the coordinator's own steps: a bar that redraws itself is load."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class CaseProgress:
    """A context over the cases of one suite: a transient bar on a terminal, a line for each case elsewhere."""

    def __init__(self, suite: str, cases: int) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[step]}"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=self._plain,
        )
        self._task = self._bar.add_task(suite, total=cases, step="")
        self._suite = suite

    def __enter__(self) -> CaseProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def case(self, name: str) -> None:
        if self._plain:
            print(f"{self._suite} {name}", file=sys.stderr, flush=True)
        self._bar.update(self._task, description=f"{self._suite} {name}", step="", refresh=not self._plain)

    def step(self, text: str) -> None:
        self._bar.update(self._task, step=text, refresh=not self._plain)

    def done(self) -> None:
        self._bar.update(self._task, advance=1, refresh=not self._plain)
