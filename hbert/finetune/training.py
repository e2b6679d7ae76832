"""One training run: the Trainer of transformers with batches of similar lengths, kept at its best epoch."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, Subset
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available
from transformers.trainer_pt_utils import get_length_grouped_indices

from hbert.errors import HbertError

from .encoding import EncodedTexts
from .metrics import decide, measure
from .settings import Settings


@dataclass(frozen=True)
class Task:
    """Encoded and labelled splits."""

    train: EncodedTexts
    valid: EncodedTexts
    num_labels: int
    multi: bool


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        epochs: the measures of the validation split after each epoch, with both losses.
        best_epoch: the first of the epochs with the highest score, counted from 1.
        validation: its measures.
        seconds: of training and validation.
        folder: weights and configuration at the best epoch.
    """

    lr: float
    seed: int
    epochs: list[dict[str, float]]
    best_epoch: int
    validation: dict[str, float]
    seconds: float
    folder: Path


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Settings,
    lr: float,
    seed: int,
    dtype: str,
    folder: Path,
    events: Path,
    callback: TrainerCallback,
) -> TrainedRun:
    """Trains the model with AdamW and leaves its best epoch in ``folder``.

    Args:
        lr, seed: of this run. The seed decides batches and dropout; the first weights are the caller's.
        dtype: "fp32", or "bf16" for autocast.
        events: where TensorBoard finds the run, if that is installed.

    Raises:
        HbertError: the loss became NaN or infinite.
    """
    work = folder.with_name(f"{folder.name}-epochs")
    trainer = _LengthTrainer(
        model=model,
        args=_arguments(settings, lr, seed, dtype, work, math.ceil(len(task.train) / settings.batch_size)),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=task.train,
        # Neighbours of one length: BERT pays for padding, our own models do not.
        eval_dataset=Subset(task.valid, np.argsort(-task.valid.lengths, kind="stable").tolist()),
        # Of what a model returns beside its logits, such as BART's states, nothing is kept.
        preprocess_logits_for_metrics=lambda found, _: found[0] if isinstance(found, tuple) else found,
        compute_metrics=lambda found: _measure(found, task),
        callbacks=_callbacks(settings, events, callback),
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    epochs = _epochs(trainer.state)
    best = max(range(len(epochs)), key=lambda i: epochs[i][settings.chosen_by])
    model.save_pretrained(folder)
    shutil.rmtree(work)
    names = [name for name in epochs[best] if not name.endswith("loss")]
    return TrainedRun(lr, seed, epochs, best + 1, {name: epochs[best][name] for name in names}, seconds, folder)


def _arguments(
    settings: Settings, lr: float, seed: int, dtype: str, work: Path, steps_per_epoch: int
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return _OneDevice(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        learning_rate=lr,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        warmup_steps=math.ceil(settings.warmup * settings.epochs * steps_per_epoch),
        weight_decay=settings.weight_decay,
        seed=seed,
        bf16=dtype == "bf16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model=settings.chosen_by,
        greater_is_better=True,
        # A loss that is not a number must be seen, not averaged over.
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


def _callbacks(settings: Settings, events: Path, callback: TrainerCallback) -> list[TrainerCallback]:
    callbacks = [callback, _StopAtNaN()]
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    if is_tensorboard_available():
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(events))))
    return callbacks


class _StopAtNaN(TrainerCallback):
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise HbertError(
                f"the training loss is {loss} after step {state.global_step} (lr {args.learning_rate:g}, "
                f"seed {args.seed}): try a smaller --lr"
            )


class _OneDevice(TrainingArguments):
    """The Trainer's arguments, for the first GPU alone: of several it would make nn.DataParallel, a batch on each.

    One batch is what the settings say it is, on any machine.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class _LengthTrainer(Trainer):
    """The Trainer, with :class:`ShuffledLengthBatches`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        assert isinstance(self.train_dataset, EncodedTexts)
        lengths = self.train_dataset.lengths
        return ShuffledLengthBatches(lengths, self.args.train_batch_size, self.args.seed)


class ShuffledLengthBatches(Sampler[int]):
    """Indices whose every ``batch_size`` neighbours have similar lengths, the batches in random order.

    Texts are drawn together as ``group_by_length`` of transformers does, which then hands out the longest of
    every 50 batches first: a training in waves of length. Each pass draws anew.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self._lengths, self._batch_size = lengths.tolist(), batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        size = self._batch_size
        indices = get_length_grouped_indices(self._lengths, size, generator=self._generator)
        full = len(indices) // size
        for batch in torch.randperm(full, generator=self._generator).tolist():
            yield from indices[batch * size : (batch + 1) * size]
        # The incomplete batch stays last: neighbours are counted from the start.
        yield from indices[full * size :]


def _measure(found: EvalPrediction, task: Task) -> dict[str, float]:
    # Of logits: above 0 is a probability above 1/2.
    predictions = decide(np.asarray(found.predictions), task.multi, threshold=0)
    return measure(np.asarray(found.label_ids), predictions, task.num_labels)


def _epochs(state: TrainerState) -> list[dict[str, float]]:
    """The evaluations in the log, each with the training loss that was logged before it."""
    epochs: list[dict[str, float]] = []
    training_loss = float("nan")
    for entry in state.log_history:
        if "eval_loss" in entry:
            epochs.append(_epoch(entry, training_loss))
        else:
            training_loss = entry.get("loss", training_loss)
    return epochs


def _epoch(entry: Mapping[str, float], training_loss: float) -> dict[str, float]:
    kept = {
        name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "eval_loss"))
    }
    return {"training_loss": training_loss, "validation_loss": entry["eval_loss"], **kept}
