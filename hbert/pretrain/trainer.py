"""A run from its settings to its folder: text, model, calibration, training, result."""

from __future__ import annotations

import errno
import math
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from hbert.convert.initial import InitialWeights
from hbert.data.storage import NO_ROOM, cache_refusal
from hbert.data.token_cache import TokenCache
from hbert.data.tokenizer import load_tokenizer
from hbert.errors import HbertError
from hbert.modeling import HBertForMaskedLM

from . import folder, machine
from .batches import StepBatches
from .budget import CALIBRATION_SHARE, StepTime, doubt_of, measure_step, steps_in
from .checkpoint import load_weights, newest_checkpoint, read_state
from .engine import Engine
from .loop import INTERRUPTED, Outlets, Plan, State, Training
from .metrics import Events, MetricsLog, check_log, read_metrics
from .model_card import model_card
from .models import build_model, model_config, model_fields, parameter_counts
from .progress import Display
from .settings import Settings
from .text import Text, prepare_text

# One rate for every run, whatever it trains with: accuracies are compared between runs.
EVAL_RATE = 0.15
_MOST_EVALUATIONS = 20
# Neither the number of steps nor the machine may change what is measured.
_EVAL_TOKENS = 65_536
# How long a process waits for the others: the first one alone prepares the text and evaluates.
_WAIT = timedelta(days=1)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LINES = 400
_SAVE_SHARE, _SAVE_SECONDS = 10, 600.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended, after how many steps, and the signal that interrupted it, if any.

    ``main``: this process is the one that speaks for all; ``evaluation``: the last line of metrics of its
    kind, None in the other processes.
    """

    status: str
    step: int
    signal: int | None
    evaluation: dict[str, Any] | None
    main: bool


def pretrain(
    settings: Settings, options: Mapping[str, Any], record: Mapping[str, Any] | None, started: float
) -> Outcome:
    """Trains as the settings say and leaves the run folder behind.

    Args:
        options: what the settings were made of; kept in run.json.
        record: run.json of the run to go on with; None for a new one.
        started: ``time.monotonic()`` of the start, from which the deadline counts.

    Raises:
        ValueError, HbertError: as its parts do. A new run's folder is made, or refused if it is not empty, before
            any work, and stays empty but for its lock until training begins.
    """
    # The engine does its own autocast: not one more from accelerate's configuration.
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=_WAIT)]
    )
    with Display(silent=not accelerator.is_main_process) as display:
        try:
            return _Run(settings, options, record, started, accelerator, display).run()
        except OSError as error:
            if (reason := _refused_write(settings.out, error)) is None:
                raise
            raise HbertError(reason) from error
        finally:
            accelerator.end_training()


def build_engine(settings: Settings, cache: TokenCache, accelerator: Accelerator, dtype: str) -> Engine:
    """Returns a run's model, with its first weights, and optimizers.

    Raises:
        HbertError: the model's vocabulary is smaller than the tokenizer's.
        ValueError: values of the configuration that do not fit together.
    """
    pad = cache.special_ids["[PAD]"]
    recipe = settings.recipe
    config = model_config(settings.arch, settings.size, settings.fields, recipe, cache.vocab_size, pad)
    if config.vocab_size < cache.vocab_size:
        raise HbertError(
            f"the vocabulary does not match: the tokenizer has {cache.vocab_size} pieces, "
            f"vocab_size is {config.vocab_size}"
        )
    model = build_model(config, settings.seed)
    return Engine(accelerator, model, recipe, seed=settings.seed, dtype=dtype, compiled=settings.compile)


def build_batches(settings: Settings, cache: TokenCache, accelerator: Accelerator) -> StepBatches:
    """Returns the batches of this process."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    device = accelerator.device
    return StepBatches(cache, settings.recipe, settings.seed, device, rank=rank, processes=processes)


class _Run:
    def __init__(
        self,
        settings: Settings,
        options: Mapping[str, Any],
        record: Mapping[str, Any] | None,
        started: float,
        accelerator: Accelerator,
        display: Display,
    ) -> None:
        self.settings, self.options, self.record = settings, options, record
        self.accelerator, self.display = accelerator, display
        self.deadline = None if settings.deadline is None else started + settings.deadline
        self.recipe = settings.recipe
        self.state = State()
        self.dtype = record["dtype"] if record else machine.resolve_dtype(settings.dtype, self.accelerator.device)
        self.init: dict[str, Any] | None = None

    def run(self) -> Outcome:
        with ExitStack() as claim:
            self._claim_folder(claim)
            return self._run_claimed()

    def _run_claimed(self) -> Outcome:
        settings, main = self.settings, self.accelerator.is_main_process
        initial = self._initial_weights()
        with self.state.timed("data"), self.accelerator.main_process_first():
            text = prepare_text(settings, self.display.say if main else _silent)
        engine = build_engine(settings, text.cache, self.accelerator, self.dtype)
        if initial is not None:
            self._initialize(engine, initial)
        del initial  # as large as the model, and the run is long
        batches = build_batches(settings, text.cache, self.accelerator)
        if settings.compile:
            with self.state.timed("compile"), engine.rehearsal():
                self._rehearse(engine, batches, self.recipe.batch_size)
        record = self._begin(text, engine, batches) if self.record is None else self._take_up(text, engine)
        training = self._training(text, engine, batches, record)
        self.display.say(self._opening(record))
        with training.signals:
            try:
                status = training.run()
            finally:
                _close(training.outlets)
            if main:
                self._finish(text, engine, status)
            # torchrun kills all as soon as one has left with the status of a signal.
            self.accelerator.wait_for_everyone()
        # Another process may have been the one that was told to stop.
        number = (training.signals.received or signal.SIGTERM) if status == INTERRUPTED else None
        return Outcome(status, self.state.step, number, self.state.last_eval, main)

    def _claim_folder(self, claim: ExitStack) -> None:
        """The main process, which alone writes, keeps others out of the folder until ``claim`` ends."""
        refusal: HbertError | None = None
        if self.accelerator.is_main_process:
            try:
                claim.enter_context(folder.claimed(self.settings.out, new=self.record is None))
            except HbertError as error:
                refusal = error
        if refusal := self._shared(refusal):
            raise refusal

    def _initial_weights(self) -> InitialWeights | None:
        """The weights of --init-from for a new run, read before any work and checked against its model."""
        settings = self.settings
        if self.record is not None or settings.init_from is None or settings.init_parts is None:
            return None
        initial = InitialWeights.read(settings.init_from, settings.init_parts)
        assert settings.tokenizer is not None
        vocab_size = load_tokenizer(settings.tokenizer).get_vocab_size()
        config = model_config(settings.arch, settings.size, settings.fields, self.recipe, vocab_size)
        initial.check(config, settings.tokenizer)
        return initial

    def _initialize(self, engine: Engine, initial: InitialWeights) -> None:
        assert isinstance(engine.model, HBertForMaskedLM)
        self.init = initial.apply(engine.model)
        moved = self.init["parameters"]
        self.display.say(f"first weights from {initial.folder} ({initial.parts}): {moved:,} parameters")

    def _begin(self, text: Text, engine: Engine, batches: StepBatches) -> dict[str, Any]:
        plan = self._plan(engine, batches)
        record = self._new_record(text, engine, plan)
        if self.accelerator.is_main_process:
            state = asdict(self.state)
            folder.create(self.settings.out, record, engine.model, text.tokenizer, engine.optimizers, state)
        return record

    def _plan(self, engine: Engine, batches: StepBatches) -> Plan:
        settings = self.settings
        calibration: dict[str, Any] | None = None
        seconds = None
        max_steps = settings.max_steps
        if settings.budget is not None:
            max_steps, times = self._calibrate(engine, batches, settings.budget)
            seconds = times["full"].seconds
            calibration = {name: asdict(entry) for name, entry in times.items()}
        assert max_steps is not None
        eval_blocks = settings.eval_blocks or max(1, _EVAL_TOKENS // self.recipe.block_size)
        # All of them together read no more tokens than training does, and cost less: they only run forward.
        evaluations = max_steps * self.recipe.batch_size // eval_blocks
        save = -(-max_steps // _SAVE_SHARE)
        return Plan(
            max_steps=max_steps,
            dtype=self.dtype,
            log_every=settings.log_every or -(-max_steps // _LINES),
            eval_every=settings.eval_every or -(-max_steps // max(1, min(_MOST_EVALUATIONS, evaluations))),
            eval_blocks=eval_blocks,
            save_every=save if seconds is None else max(1, min(save, int(_SAVE_SECONDS / seconds))),
            step_seconds=seconds,
            calibration=calibration,
        )

    def _calibrate(self, engine: Engine, batches: StepBatches, budget: float) -> tuple[int, dict[str, StepTime]]:
        self.display.say("calibrating: how long a step takes")
        sizes = {"full": self.recipe.batch_size, "ramp_start": self.recipe.ramp_start}
        sizes = {name: size for name, size in sizes.items() if size}
        patience = min(CALIBRATION_SHARE * budget, self._seconds_left() / 2) / len(sizes)
        with self.state.timed("calibration"), engine.rehearsal():
            times = {
                name: measure_step(partial(self._rehearse, engine, batches, size), self._shared, patience)
                for name, size in sizes.items()
            }
        # The processes have timed steps that they took together, but to the microsecond they differ: by its own
        # times one could find room for a step where another finds none.
        times = self._shared(times)
        steps = steps_in(budget, self.recipe, times["full"].seconds, times.get("ramp_start", times["full"]).seconds)
        if doubt := doubt_of(times.values()):
            self.display.say(doubt)
        return steps, times

    def _seconds_left(self) -> float:
        """Until the deadline; infinite without one."""
        return math.inf if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def _rehearse(self, engine: Engine, batches: StepBatches, blocks: int) -> None:
        engine.step(0, batches.at(0, 0, blocks), 1e-3)

    def _shared(self, value: Any) -> Any:
        """The main process's value."""
        return broadcast_object_list([value])[0]

    def _new_record(self, text: Text, engine: Engine, plan: Plan) -> dict[str, Any]:
        return {
            "format": folder.FORMAT,
            "status": "running",
            "options": dict(self.options),
            "settings": self.settings.identity,
            "recipe": {"name": self.settings.recipe_name, **asdict(self.recipe)},
            "model": model_fields(engine.model.config),
            "parameters": parameter_counts(engine.model),
            "init": self.init,
            **text.record(),
            "plan": asdict(plan),
            "max_steps": plan.max_steps,
            "step_seconds": plan.step_seconds,
            "dtype": plan.dtype,
            "processes": self.accelerator.num_processes,
            "eval": {"rate": EVAL_RATE, "blocks": plan.eval_blocks, "length": self.recipe.block_size},
            "machine": machine.describe(self.accelerator.device),
            "software": machine.software() | {"optimizers": engine.optimizers.kinds},
            "times": self.state.seconds,
        }

    def _take_up(self, text: Text, engine: Engine) -> dict[str, Any]:
        out, record = self.settings.out, dict(self.record or {})
        if changed := folder.text_differences(record, text.record()):
            raise HbertError(f"--resume: {out} began with another {' and another '.join(changed)}; nothing was changed")
        checkpoint = newest_checkpoint(out)
        run, state = read_state(checkpoint, lambda stored: (stored["run"], State.of(stored)))
        if run != folder.record_digest(record):
            raise HbertError(f"the checkpoint {checkpoint} belongs to another run than {out / folder.RUN}")
        check_log(out / folder.METRICS, state.metrics_bytes)
        load_weights(checkpoint, engine.model, engine.optimizers)
        spent, self.state = self.state.seconds, state
        for activity, seconds in spent.items():
            self.state.seconds[activity] = self.state.seconds.get(activity, 0.0) + seconds
        if self.accelerator.is_main_process:
            folder.remove_remains(out)
            folder.update(out, status="running")
        return record

    def _training(self, text: Text, engine: Engine, batches: StepBatches, record: Mapping[str, Any]) -> Training:
        settings, plan = self.settings, Plan(**record["plan"])
        return Training(
            engine=engine,
            batches=batches,
            recipe=self.recipe,
            plan=plan if settings.save_every is None else _saving_every(settings.save_every, plan),
            state=self.state,
            outlets=self._outlets(),
            tokenizer=text.tokenizer,
            evaluate=partial(self._evaluate, text, engine, plan.eval_blocks),
            out=settings.out,
            keep=settings.keep,
            deadline=self.deadline,
            digest=folder.record_digest(record),
        )

    def _outlets(self) -> Outlets:
        out, state = self.settings.out, self.state
        if not self.accelerator.is_main_process:
            return Outlets(self.display, None, None)
        events = Events(out / folder.EVENTS, state.step)
        if not events.installed:
            self.display.say("no TensorBoard events: tensorboard is not installed")
        return Outlets(self.display, MetricsLog(out / folder.METRICS, state.metrics_bytes), events)

    def _evaluate(self, text: Text, engine: Engine, blocks: int) -> Any:
        from hbert.evaluate.held_out import evaluate

        return evaluate(
            engine.model,
            text.cache,
            self.recipe.block_size,
            rate=EVAL_RATE,
            batch_size=self.recipe.batch_size,
            max_blocks=blocks,
            dtype=self.dtype,
        )

    def _opening(self, record: Mapping[str, Any]) -> str:
        settings, plan = self.settings, record["plan"]
        parameters, step = record["parameters"]["total"], plan["step_seconds"]
        pace = "" if step is None else f" of {step * 1e3:.3g} ms"
        begin = f"from step {self.state.step:,} to" if self.state.step else "for"
        return (
            f"{settings.arch} {settings.size}, {parameters:,} parameters, {self.dtype}: {begin} "
            f"{plan['max_steps']:,} steps{pace} into {settings.out}"
        )

    def _finish(self, text: Text, engine: Engine, status: str) -> None:
        out, state = self.settings.out, self.state
        record = folder.update(out, times=state.seconds, step=state.step)
        if status != INTERRUPTED:
            if record["step_seconds"] is None:
                record = folder.update(out, step_seconds=_typical_step(out / folder.METRICS))
            record = folder.update(out, result=state.last_eval)
            folder.export(out, engine.model, text.tokenizer, model_card(record | {"status": status}))
        # Last: whoever reads that a run has ended takes its model to be the one of its end.
        folder.update(out, status=status)


def _refused_write(out: Path, error: OSError) -> str | None:
    """What an error of the file system means to the user of a run folder; None: it has another cause."""
    path = error.filename
    inside = isinstance(path, str) and Path(path).absolute().is_relative_to(out.absolute())
    if error.errno in NO_ROOM and (inside or cache_refusal(error) is None):
        remedy = " and go on with --resume" if (out / folder.RUN).is_file() else ""
        return f"{out}: {error}; make room{remedy}"
    return f"--out {out} cannot be written to: {error}" if error.errno in _DENIED and inside else None


def _silent(line: str) -> None:
    return None


def _close(outlets: Outlets) -> None:
    for outlet in (outlets.log, outlets.events):
        if outlet is not None:
            outlet.close()


def _saving_every(steps: int, plan: Plan) -> Plan:
    return Plan(**{**asdict(plan), "save_every": steps})


def _typical_step(metrics: Any) -> float:
    return median(entry["step_seconds"] for entry in read_metrics(metrics) if entry["kind"] == "train")
