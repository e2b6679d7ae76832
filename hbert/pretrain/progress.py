"""What a run shows while it works: a live bar on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .engine import StepResult
from .metrics import Meter

_BAR_SECONDS = 0.5
_LINE_SECONDS = 10.0


class Display:
    """Progress of the process that speaks for all; the others are given ``silent=True``."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=silent)
        # It is drawn by hand: a thread of its own would take time from the cores that train.
        self._bar = Progress(
            BarColumn(16),
            TextColumn("{task.description}"),
            console=self._console,
            auto_refresh=False,
            disable=silent or not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._interval = _LINE_SECONDS if self._bar.disable else _BAR_SECONDS
        self._recent, self._shown = Meter(), time.monotonic()
        self._total = 0
        self._held_out = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, markup=False)

    def start(self, done: int, total: int) -> None:
        """Starts the bar."""
        self._total, self._shown = total, time.monotonic()
        self._bar.start()
        self._task = self._bar.add_task("", total=total, completed=done)

    def evaluated(self, loss: float, accuracy: float) -> None:
        """Keeps the latest evaluation, for the bar and the lines."""
        self._held_out = f"  held out {loss:.3f} {accuracy:.4f}"

    def stepped(self, step: int, result: StepResult, tokens: int, seconds: float) -> None:
        """Counts a step, and shows the means since the last time where it is time to."""
        if self._silent:
            return
        self._recent.add(result, tokens, seconds)
        now = time.monotonic()
        if now - self._shown < self._interval and step < self._total:
            return
        pace, quality = self._lines(step)
        if self._bar.disable:
            self.say(f"{pace}  {quality}")
        else:
            assert self._task is not None
            # Two lines fit into 80 columns beside the bar.
            self._bar.update(self._task, completed=step, description=f"{pace}\n{quality}", refresh=True)
        self._recent, self._shown = Meter(), now

    def _lines(self, step: int) -> tuple[str, str]:
        means = self._recent.means()
        left = (self._total - step) * means["step_seconds"]
        return (
            f"step {step:,}/{self._total:,}  {_clock(left)} left  {self._recent.tokens_per_second:,.0f} tokens/s",
            f"loss {means['loss']:.3f}  masked accuracy {means['accuracy']:.4f}{self._held_out}",
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
