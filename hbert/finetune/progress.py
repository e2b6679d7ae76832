"""What a fine-tuning shows while it trains, on stderr: a line an epoch, and a live bar on a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Display:
    """The terminal of one command; each training run takes a bar of its own by ``callback``."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(16),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False)

    def callback(self, title: str, metric: str) -> RunDisplay:
        """Returns the callback of a run that is called ``title`` and judged by ``metric``."""
        return RunDisplay(self, title, metric)


class RunDisplay(TrainerCallback):
    """Draws the steps of a run, and prints a line for every epoch."""

    def __init__(self, display: Display, title: str, metric: str):
        self._display, self._title, self._metric = display, title, metric
        self._task: TaskID | None = None
        self._loss = float("nan")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._task = self._display.bar.add_task(self._title, total=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._task is not None
        place = f"{self._title}  epoch {int(state.epoch or 0) + 1}/{int(args.num_train_epochs)}"
        self._display.bar.update(self._task, completed=state.global_step, description=place)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loss = (kwargs.get("logs") or {}).get("loss", self._loss)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        measured = kwargs["metrics"]
        self._display.say(
            f"{self._title}  epoch {round(state.epoch or 0)}/{int(args.num_train_epochs)}  training loss "
            f"{self._loss:.4f}  validation loss {measured['eval_loss']:.4f}  {self._metric} "
            f"{measured['eval_' + self._metric]:.4f}"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._task is not None
        self._display.bar.remove_task(self._task)
