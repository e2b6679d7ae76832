"""The training loop: steps, and between them lines of metrics, evaluations, checkpoints and requests to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from .batches import StepBatches
from .checkpoint import checkpoints, save_checkpoint
from .engine import Engine, NonFiniteError, StepResult, first_non_finite
from .metrics import Events, Meter, MetricsLog
from .progress import Display
from .recipes import Recipe
from .schedule import BatchPlan, lr_factor
from .signals import StopSignals

if TYPE_CHECKING:
    from hbert.evaluate.held_out import EvalResult

FINISHED, DEADLINE, INTERRUPTED = "finished", "deadline", "interrupted"


@dataclass(frozen=True)
class Plan:
    """What is decided once, when a run begins. ``step_seconds``: of the calibration, None without one."""

    max_steps: int
    dtype: str
    log_every: int
    eval_every: int
    eval_blocks: int
    save_every: int
    step_seconds: float | None
    calibration: dict[str, Any] | None


@dataclass
class State:
    """How far a run has come; a checkpoint holds it beside the weights.

    ``step``: steps done; ``evaluated``: steps done at the last evaluation; ``meter``: since the last line of
    metrics; ``seconds``: time spent, by activity; ``metrics_bytes``: length of metrics.jsonl.
    """

    step: int = 0
    evaluated: int = 0
    metrics_bytes: int = 0
    meter: Meter = field(default_factory=Meter)
    seconds: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, Any] | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> State:
        """The state that a checkpoint holds.

        Raises:
            KeyError, TypeError: it is not the state of a checkpoint.
        """
        names = ("step", "evaluated", "metrics_bytes", "seconds", "last_eval")
        return cls(**{name: stored[name] for name in names}, meter=Meter(**stored["meter"]))

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Adds the time of the block to an activity."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - began


@dataclass
class Outlets:
    """Where the speaking process reports to; the other processes have no log and no events."""

    display: Display
    log: MetricsLog | None
    events: Events | None

    def write(self, entry: dict[str, Any]) -> None:
        """Writes a line of metrics, and its numbers as events."""
        if self.log is not None:
            self.log.write(entry)
        if self.events is not None:
            self.events.write(entry)


@dataclass
class Training:
    """One run from its state to ``max_steps``, the deadline or a signal.

    ``evaluate`` is called by the speaking process alone; ``deadline`` is a ``time.monotonic()``. Signals count
    inside ``signals``, which whoever runs it leaves when everything is written.
    """

    engine: Engine
    batches: StepBatches
    recipe: Recipe
    plan: Plan
    state: State
    outlets: Outlets
    tokenizer: Tokenizer
    evaluate: Callable[[], EvalResult]
    out: Path
    keep: int
    deadline: float | None
    digest: str

    def __post_init__(self) -> None:
        self._batch_plan = BatchPlan(self.recipe, self.plan.max_steps)
        self._main = self.engine.accelerator.is_main_process
        self.signals = StopSignals()

    def run(self) -> str:
        """Trains, and returns how it ended: FINISHED, DEADLINE, or INTERRUPTED (a checkpoint is saved).

        Raises:
            NonFiniteError: a loss, gradient or parameter is not finite; the last checkpoint is from before.
            HbertError: a checkpoint could not be written.
        """
        status = self._train()
        if status != INTERRUPTED and self.state.evaluated != self.state.step:
            self._evaluate()
        self._save()
        return status

    def _train(self) -> str:
        state, plan = self.state, self.plan
        self.outlets.display.start(state.step, plan.max_steps)
        if state.step % plan.eval_every == 0 and state.evaluated < state.step:
            self._evaluate()
        while state.step < plan.max_steps:
            result = self._step()
            interrupted, late = result.votes
            if interrupted:
                return INTERRUPTED
            if late and state.step < plan.max_steps:
                if state.meter.steps:
                    self._log()
                return DEADLINE
            if state.step % plan.eval_every == 0 or state.step == plan.max_steps:
                self._evaluate()
            if state.step % plan.save_every == 0 and state.step < plan.max_steps:
                self._save()
        return FINISHED

    def _step(self) -> StepResult:
        state, began = self.state, time.perf_counter()
        factor = lr_factor(state.step, self.plan.max_steps, self.recipe)
        batch = self.batches.of(state.step, self._batch_plan)
        try:
            result = self.engine.step(state.step, batch, factor, self._votes)
        except NonFiniteError as error:
            raise self._with_checkpoint(error) from error
        seconds = time.perf_counter() - began
        state.step += 1
        state.seconds["training"] = state.seconds.get("training", 0.0) + seconds
        tokens = batch.blocks * self.recipe.block_size
        state.meter.add(result, tokens, seconds)
        self.outlets.display.stepped(state.step, result, tokens, seconds)
        if state.step % self.plan.log_every == 0 or state.step == self.plan.max_steps:
            self._log()
        return result

    def _votes(self) -> tuple[int, ...]:
        late = self._main and self.deadline is not None and time.monotonic() > self.deadline
        return int(self.signals.received is not None), int(late)

    def _log(self) -> None:
        factor = lr_factor(self.state.step - 1, self.plan.max_steps, self.recipe)
        means = self.state.meter.means()
        self.outlets.write(self._entry("train") | {"lr": self.recipe.lr * factor} | means)
        self.state.meter = Meter()

    def _entry(self, kind: str) -> dict[str, Any]:
        state = self.state
        return {
            "kind": kind,
            "step": state.step,
            "tokens": self._batch_plan.start(state.step) * self.recipe.block_size,
            "train_seconds": state.seconds.get("training", 0.0),
        }

    def _evaluate(self) -> None:
        state = self.state
        state.evaluated = state.step
        if not self._main:
            return
        with state.timed("evaluation"):
            result = asdict(self.evaluate())
        state.last_eval = self._entry("eval") | result
        self.outlets.write(state.last_eval)
        self.outlets.display.evaluated(result["loss"], result["accuracy"])

    def _save(self) -> None:
        # Finite gradients can still make an infinite parameter, which the next step would have found.
        if found := first_non_finite(self.engine.model):
            raise self._with_checkpoint(NonFiniteError(f"after step {self.state.step}: {found} is not finite"))
        if not self._main:
            return
        assert self.outlets.log is not None
        with self.state.timed("checkpoints"):
            self.state.metrics_bytes = self.outlets.log.sync()
            content = {"run": self.digest, **asdict(self.state)}
            model, optimizers = self.engine.model, self.engine.optimizers
            save_checkpoint(self.out, self.state.step, model, self.tokenizer, optimizers, content, self.keep)

    def _with_checkpoint(self, error: NonFiniteError) -> NonFiniteError:
        saved = checkpoints(self.out)
        return NonFiniteError(f"{error}; the last good checkpoint is {saved[-1]}" if saved else str(error))
