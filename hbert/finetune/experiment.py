"""A fine-tuning from files to a folder: check everything, train, choose on validation, test once, write."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hbert.data.storage import sha256_file, write_json
from hbert.data.terminal import counted, progress
from hbert.errors import HbertError
from hbert.precision import device
from hbert.pretrain.machine import describe, resolve_dtype, software
from hbert.pretrain.settings import field_values

from .confusion import save_confusion_plot
from .encoding import EncodedTexts, encode_texts, forget_truncation
from .examples import Examples, LabelSet, read_examples
from .inference import Runner, class_probabilities
from .metrics import confusion_matrix, decide, measure, per_label
from .model_card import model_card
from .models import load_classifier, load_new_classifier, load_text_tokenizer, text_length
from .naive_bayes import NaiveBayes
from .output import RESULTS, check_output, output_folder
from .predictions import writing_predictions
from .progress import Display
from .settings import SPLITS, Settings
from .training import Task, TrainedRun, train

FORMAT = 1
PREDICTIONS, EVENTS, CONFUSION = "predictions", "tensorboard", "confusion.png"


@dataclass(frozen=True)
class Prepared:
    """What a fine-tuning works with, all of it checked.

    Attributes:
        examples, encoded, targets: of "train", "valid" and "test".
        about: what the record says of model and data.
    """

    labels: LabelSet
    tokenizer: PreTrainedTokenizerBase
    examples: dict[str, Examples]
    encoded: dict[str, EncodedTexts]
    targets: dict[str, np.ndarray]
    max_length: int
    dtype: str
    about: dict[str, Any]


def finetune(settings: Settings, display: Display) -> dict[str, Any]:
    """Runs a fine-tuning, writes ``settings.out`` and returns the record that stands in its results.json.

    Raises:
        HbertError, ValueError: bad input, before anything is trained; the loss became NaN; a full disk.
    """
    settings.check()
    inputs = [settings.model, *(() if settings.dataset else (getattr(settings, name) for name in SPLITS))]
    check_output(settings.out, settings.overwrite, [Path(str(path)) for path in inputs])
    prepared = prepare(settings)
    for line in _notes(prepared):
        display.say(line)
    try:
        with output_folder(settings.out) as folder:
            runs = _train_all(settings, prepared, folder, display)
            record = _test_all(settings, prepared, runs, folder)
            _write(settings, prepared, runs, record, folder)
    except (OSError, SafetensorError) as error:
        raise HbertError(f"{settings.out} could not be written: {error}") from error
    return record


def prepare(settings: Settings) -> Prepared:
    """Reads and checks model and data.

    Raises:
        HbertError, ValueError: see :func:`finetune`.
    """
    rows = settings.open_splits()
    examples = {name: read_examples(split, settings.columns_of_text) for name, split in rows.items()}
    declared = rows["train"].declared_labels(settings.label_column)
    labels = LabelSet.collect(examples["train"], declared, settings.multi_label)
    targets = {name: labels.encode(split) for name, split in examples.items()}
    model = _fresh_model(settings, labels, settings.seeds[0])
    tokenizer = load_text_tokenizer(settings.model, model)
    max_length = text_length(model, tokenizer, settings.max_length, settings.text_pair_column is not None)
    with progress("tokenize", sum(map(len, examples.values()))) as advance:
        encoded = {
            name: encode_texts(tokenizer, split.texts, split.pairs, max_length, advance).with_labels(targets[name])
            for name, split in examples.items()
        }
    dtype = resolve_dtype(settings.dtype, device())
    about = {"model": _about_model(model), "data": _about_data(settings, encoded)}
    return Prepared(labels, tokenizer, examples, encoded, targets, max_length, dtype, about)


def _fresh_model(settings: Settings, labels: LabelSet, seed: int) -> PreTrainedModel:
    return load_new_classifier(settings.model, labels, field_values(settings.fields), seed)


def _about_model(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.to_diff_dict()
    # architectures: what the checkpoint was; "class" says what it has become.
    for name in ("id2label", "label2id", "_name_or_path", "architectures"):
        config.pop(name, None)
    return {"class": type(model).__name__, "parameters": model.num_parameters(), "config": config}


def _about_data(settings: Settings, encoded: dict[str, EncodedTexts]) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for name, split in encoded.items():
        source = getattr(settings, name) or SPLITS[name]
        digest = {} if settings.dataset else {"sha256": sha256_file(Path(source))}
        about[name] = {
            "source": source,
            "texts": len(split),
            "tokens": int(split.lengths.sum()),
            "truncated": split.num_truncated,
            **digest,
        }
    return about


def _notes(prepared: Prepared) -> list[str]:
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in prepared.encoded.items())
    lines = [f"{sizes} texts; {counted(len(prepared.labels.names), 'label')}; {prepared.dtype}"]
    truncated = {name: split.num_truncated for name, split in prepared.encoded.items() if split.num_truncated}
    if truncated:
        counts = ", ".join(f"{count:,} of {name}" for name, count in truncated.items())
        lines.append(f"truncated to {prepared.max_length} tokens: {counts}")
    return lines


def _train_all(settings: Settings, prepared: Prepared, folder: Path, display: Display) -> list[TrainedRun]:
    """All runs: the learning rates with the first seed, then the other seeds with the best of them."""
    display.say(f"TensorBoard events: {folder / EVENTS} (until it is done, then in {settings.out})")
    with display:
        sweep = [_train_one(settings, prepared, lr, settings.seeds[0], folder, display) for lr in settings.lr]
        best = max(sweep, key=lambda run: run.validation[settings.chosen_by])
        for run in sweep:
            if run is not best:
                shutil.rmtree(run.folder)
        others = [_train_one(settings, prepared, best.lr, seed, folder, display) for seed in settings.seeds[1:]]
    return [*sweep, *others]


def _train_one(
    settings: Settings, prepared: Prepared, lr: float, seed: int, folder: Path, display: Display
) -> TrainedRun:
    title = f"lr {lr:g} seed {seed}"
    name = title.replace(" ", "-")
    encoded, labels = prepared.encoded, prepared.labels
    task = Task(encoded["train"], encoded["valid"], len(labels.names), labels.multi)
    return train(
        _fresh_model(settings, labels, seed),
        prepared.tokenizer,
        task,
        settings,
        lr,
        seed,
        prepared.dtype,
        folder / f"run-{name}",
        folder / EVENTS / name,
        display.callback(title, settings.chosen_by),
    )


def _chosen(settings: Settings, runs: Sequence[TrainedRun]) -> list[TrainedRun]:
    """The runs of the best learning rate: one for each seed."""
    return [run for run in runs if run.folder.is_dir()]


def _test_all(settings: Settings, prepared: Prepared, runs: Sequence[TrainedRun], folder: Path) -> dict[str, Any]:
    chosen = _chosen(settings, runs)
    best = max(chosen, key=lambda run: run.validation[settings.chosen_by])
    tests, speeds = [], []
    for run in chosen:
        probabilities, speed = _test(prepared, run)
        _write_predictions(settings, prepared, probabilities, folder / PREDICTIONS / f"seed-{run.seed}.tsv")
        decided = decide(probabilities, prepared.labels.multi)
        tests.append(_measured(prepared, decided))
        speeds.append(speed)
        if run is best:
            details = _details(prepared, decided)
    test, floor = _summary(tests), _floor(settings, prepared, folder)
    return {
        "format": FORMAT,
        "settings": settings.as_record(),
        **prepared.about,
        "labels": list(prepared.labels.names),
        "max_length": prepared.max_length,
        "dtype": prepared.dtype,
        "lr": best.lr,
        "best_seed": best.seed,
        "runs": [_about_run(run) for run in runs],
        "validation": _summary([run.validation for run in chosen]),
        "test": test,
        "floor": floor,
        "failure": _failure(settings.chosen_by, test, floor),
        "best_seed_test": details,
        "inference": speeds,
        "machine": describe(device()),
        "software": software(),
    }


def _test(prepared: Prepared, run: TrainedRun) -> tuple[np.ndarray, dict[str, Any]]:
    """Probabilities of the test texts [N, C], from the folder that was saved, and how long they took."""
    model = load_classifier(str(run.folder))
    runner = Runner(model, prepared.tokenizer, class_probabilities(prepared.labels.multi), prepared.dtype)
    with progress(f"test seed {run.seed}", len(prepared.encoded["test"])) as advance:
        probabilities = runner.run(prepared.encoded["test"], advance)
    speed = {"seed": run.seed, "texts": runner.texts, "tokens": runner.tokens, "seconds": runner.seconds}
    return probabilities, speed


def _measured(prepared: Prepared, decided: np.ndarray) -> dict[str, float]:
    return measure(prepared.targets["test"], decided, len(prepared.labels.names))


def _details(prepared: Prepared, decided: np.ndarray) -> dict[str, Any]:
    names, truth = prepared.labels.names, prepared.targets["test"]
    by_label = dict(zip(names, per_label(truth, decided, len(names)), strict=True))
    if prepared.labels.multi:
        return {"per_label": by_label}
    return {"per_label": by_label, "confusion": confusion_matrix(truth, decided, len(names)).tolist()}


def _about_run(run: TrainedRun) -> dict[str, Any]:
    return {
        "lr": run.lr,
        "seed": run.seed,
        "best_epoch": run.best_epoch,
        "validation": run.validation,
        "seconds": run.seconds,
        "epochs": run.epochs,
    }


def _summary(measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one) of every measure over the seeds."""
    columns = {name: [entry[name] for entry in measured] for name in measured[0]}
    return {
        name: {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "values": values,
        }
        for name, values in columns.items()
    }


def _floor(settings: Settings, prepared: Prepared, folder: Path) -> dict[str, Any] | None:
    """Naive Bayes on the same files; None for multi-label tasks."""
    if prepared.labels.multi:
        return None
    texts = {name: _joined(split) for name, split in prepared.examples.items()}
    targets = prepared.targets
    model = NaiveBayes.fit(
        texts["train"], targets["train"], len(prepared.labels.names), texts["valid"], targets["valid"]
    )
    probabilities = model.probabilities(texts["test"])
    _write_predictions(settings, prepared, probabilities, folder / PREDICTIONS / "naive-bayes.tsv")
    return {"smoothing": model.smoothing, "test": _measured(prepared, decide(probabilities, multi=False))}


def _failure(metric: str, test: dict[str, Any], floor: dict[str, Any] | None) -> str | None:
    """What the floor says of a model below it; None for one that is not, and where there is no floor."""
    if floor is None or test[metric]["mean"] >= floor["test"][metric]:
        return None
    return f"Below naive Bayes in {metric}: pretraining or fine-tuning has failed"


def _joined(examples: Examples) -> list[str]:
    if examples.pairs is None:
        return examples.texts
    return [f"{text}\n{pair}" for text, pair in zip(examples.texts, examples.pairs, strict=True)]


def _write_predictions(settings: Settings, prepared: Prepared, probabilities: np.ndarray, path: Path) -> None:
    labels = prepared.labels
    with writing_predictions(path, labels.names, labels.multi, settings.label_separator, labelled=True) as writer:
        writer.write(probabilities, prepared.examples["test"].labels)


def _write(
    settings: Settings, prepared: Prepared, runs: Sequence[TrainedRun], record: dict[str, Any], folder: Path
) -> None:
    """The best seed's model, its tokenizer, the card, the picture; last of all results.json."""
    for run in _chosen(settings, runs):
        if run.seed == record["best_seed"]:
            for path in run.folder.iterdir():
                path.rename(folder / path.name)
        shutil.rmtree(run.folder)
    forget_truncation(prepared.tokenizer)
    # predict and pipelines truncate to what the tokenizer says: they must read no more of a text than training did.
    prepared.tokenizer.model_max_length = prepared.max_length
    prepared.tokenizer.save_pretrained(folder)
    if (counts := record["best_seed_test"].get("confusion")) is not None:
        save_confusion_plot(np.array(counts), prepared.labels.names, folder / CONFUSION)
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    write_json(folder / RESULTS, record)
