"""Results that are kept: results.json and the predictions of every finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.finetuning.plan import LEARNING_RATES, SEEDS, Run, sweep_run
from bench.machine import ROOT
from bench.sweep import with_edges
from hbert.data.storage import replacing

RESULTS = ROOT / "docs" / "results" / "finetuning"
_PATHS = ("model", "train", "valid", "test", "out")


def folder(run: Run) -> Path:
    """Where the record of a run is kept."""
    return RESULTS / "runs" / run.name


def is_done(run: Run) -> bool:
    """Whether the run has a record."""
    return (folder(run) / "results.json").is_file()


def record(run: Run) -> dict[str, Any]:
    """The results.json of a finished run."""
    return json.loads((folder(run) / "results.json").read_text())


def predictions(run: Run) -> Path:
    """The predictions of a finished run on the test split."""
    return folder(run) / "predictions" / f"seed-{run.seed}.tsv"


def keep(run: Run, out: Path) -> None:
    """Copies the record of a finished run; the folder appears at once and whole."""
    target = folder(run)
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    # Those of naive Bayes are the same in every run of a task.
    shutil.copytree(out / "predictions", temporary / "predictions", ignore=shutil.ignore_patterns("naive-bayes.tsv"))
    (temporary / "results.json").write_text(json.dumps(_kept(out), indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _kept(out: Path) -> dict[str, Any]:
    """results.json; of paths, which mean nothing elsewhere, the last name; no confusions, which predictions tell."""
    found = json.loads((out / "results.json").read_text())
    found.get("best_seed_test", {}).pop("confusion", None)
    for name in _PATHS:
        if found["settings"].get(name):
            found["settings"][name] = Path(found["settings"][name]).name
    for split in found["data"].values():
        split["source"] = Path(split["source"]).name
    return found


def keep_times(task: str, found: dict[str, Any]) -> None:
    """Keeps what `times.measure` returned for a task."""
    path = _times_file(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def times(task: str) -> dict[str, Any] | None:
    """What was kept of a task's times, if it was measured."""
    path = _times_file(task)
    return json.loads(path.read_text()) if path.is_file() else None


def _times_file(task: str) -> Path:
    return RESULTS / "times" / f"{task}.json"


def validation_accuracy(run: Run) -> float:
    """What chooses the learning rate."""
    return record(run)["validation"]["accuracy"]["mean"]


def sweep(task: str, model: str) -> list[Run]:
    """The runs that choose a learning rate, as far as they are known: those beyond an edge depend on others."""
    rates = with_edges(LEARNING_RATES, lambda rates: _best(task, model, rates))
    return [sweep_run(task, model, lr) for lr in rates]


def _best(task: str, model: str, rates: Sequence[float]) -> float | None:
    runs = {lr: sweep_run(task, model, lr) for lr in rates}
    if not all(map(is_done, runs.values())):
        return None
    return max(runs, key=lambda lr: validation_accuracy(runs[lr]))


def learning_rate(task: str, model: str) -> float | None:
    """The rate with the best score on the validation split; None before all were tried."""
    return _best(task, model, [run.lr for run in sweep(task, model) if run.lr is not None])


def chosen(task: str, model: str) -> list[Run]:
    """The finished runs at the chosen learning rate, one for each seed so far."""
    lr = learning_rate(task, model)
    if lr is None:
        return []
    others = [Run(task, model, seed) for seed in SEEDS[1:]]
    return [Run(task, model, SEEDS[0], lr), *filter(is_done, others)]
