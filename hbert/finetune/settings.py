"""The options of a fine-tuning, their defaults and their ranges."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hbert.errors import HbertError
from hbert.pretrain.settings import DTYPES, field_values

from .examples import Columns
from .metrics import metric_names
from .rows import DatasetRows, Rows, open_rows

SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Settings:
    """What defines a fine-tuning; see the flags of ``hbert finetune``.

    Attributes:
        train, valid, test: files, or with ``dataset`` names of its splits (default: train, validation, test).
        columns: names for files without a header.
        lr: one learning rate, or several to choose from on the validation split with the first seed.
        warmup: share of the steps in which the learning rate rises.
        patience: epochs without a better validation score after which a run ends; None: all epochs.
        metric: what chooses epoch, learning rate and seed; None: the first of the task's.
        fields: of the model's configuration, FIELD=VALUE.
    """

    model: str
    out: Path
    train: str | None = None
    valid: str | None = None
    test: str | None = None
    dataset: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    columns: tuple[str, ...] | None = None
    multi_label: bool = False
    label_separator: str = ","
    epochs: int = 10
    lr: tuple[float, ...] = (5e-5,)
    batch_size: int = 64
    seeds: tuple[int, ...] = (0,)
    max_length: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    patience: int | None = None
    metric: str | None = None
    dtype: str = "auto"
    fields: tuple[str, ...] = ()
    overwrite: bool = False

    @property
    def chosen_by(self) -> str:
        """The measure that chooses epoch, learning rate and seed."""
        return self.metric or metric_names(self.multi_label)[0]

    @property
    def columns_of_text(self) -> Columns:
        """Where text and labels stand."""
        separator = self.label_separator if self.multi_label else None
        return Columns(self.text_column, self.text_pair_column, self.label_column, separator)

    def as_record(self) -> dict[str, Any]:
        """All options as JSON values."""
        return {**asdict(self), "out": str(self.out), "metric": self.chosen_by}

    def check(self) -> None:
        """Checks all that can be checked without reading a file.

        Raises:
            ValueError: a value out of range. HbertError: options that do not go together.
        """
        _check_ranges(self)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.chosen_by not in (allowed := metric_names(self.multi_label)):
            raise ValueError(f"metric is {self.metric!r}; allowed for this kind of labels: {', '.join(allowed)}")
        if not self.label_separator:
            raise ValueError("label_separator is empty")
        field_values(self.fields)
        missing = [f"--{name}" for name in SPLITS if getattr(self, name) is None]
        if self.dataset is None and missing:
            raise HbertError(f"{', '.join(missing)} needed: the files of the splits, or --dataset")
        if self.dataset is not None and self.columns is not None:
            raise HbertError("--columns names the columns of CSV and TSV files without a header, not of a data set")

    def open_splits(self) -> dict[str, Rows]:
        """Returns the rows of "train", "valid" and "test".

        Raises:
            HbertError: a file or a split does not exist.
        """
        given = {name: getattr(self, name) for name in SPLITS}
        if self.dataset is None:
            return {name: open_rows(str(path), self.columns) for name, path in given.items()}
        dataset, _, config = self.dataset.partition(":")
        return {name: DatasetRows(dataset, config or None, given[name] or split) for name, split in SPLITS.items()}


def _check_ranges(settings: Settings) -> None:
    counts = ("epochs", "batch_size", "patience", "max_length")
    for name in counts:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for lr in settings.lr:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr is {lr}; it must be above 0")
    if not 0 <= settings.warmup < 1:
        raise ValueError(f"warmup is {settings.warmup}; it must be in [0, 1)")
    if not (math.isfinite(settings.weight_decay) and settings.weight_decay >= 0):
        raise ValueError(f"weight_decay is {settings.weight_decay}; it must be at least 0")
    for name in ("lr", "seeds"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be one or several different values, got {values}")
    if any(not 0 <= seed < 2**32 for seed in settings.seeds):
        raise ValueError(f"seeds are {settings.seeds}; they must be in [0, 2^32)")
