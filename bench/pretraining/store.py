"""Results that are kept: run.json and metrics.jsonl of every finished run, and the calibration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.pretraining.plan import LEARNING_RATES, Arm, Run, sweep_run
from bench.sweep import with_edges

RESULTS = ROOT / "docs" / "results" / "pretraining"


def calibration(group: str) -> Path:
    """Where the step times of a group of arms are kept."""
    return RESULTS / f"calibration-{group}.json"


def folder(run: Run) -> Path:
    """Where the record of a run is kept."""
    return RESULTS / "runs" / run.name


def is_done(run: Run) -> bool:
    """Whether the run has reached its end."""
    record = folder(run) / "run.json"
    return record.is_file() and json.loads(record.read_text())["status"] == "finished"


def keep(run: Run, out: Path) -> None:
    """Copies the record of a finished run; the folder appears at once and whole."""
    target = folder(run)
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    record = json.loads((out / "run.json").read_text())
    # Where the cache was means nothing elsewhere; its name is the digest of text and tokenizer.
    record["token_cache"] = Path(record["token_cache"]).name
    (temporary / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copyfile(out / "metrics.jsonl", temporary / "metrics.jsonl")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def trained_with(run: Run) -> dict[str, Any]:
    """The settings of a finished run."""
    return json.loads((folder(run) / "run.json").read_text())["settings"]


def last_evaluation(place: Path) -> dict[str, Any]:
    """The last held-out evaluation of a finished run, from its record or its own folder."""
    lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if entry["kind"] == "eval"][-1]


def sweep(arm: Arm) -> list[Run]:
    """The runs that choose an arm's learning rate, as far as they are known: those beyond an edge depend on others."""
    rates = with_edges(LEARNING_RATES if arm.lr is None else (), lambda rates: _best(arm, rates))
    return [sweep_run(arm, lr) for lr in rates]


def _best(arm: Arm, rates: Sequence[float]) -> float | None:
    """Of these rates the one with the lowest held-out loss; None before all were tried."""
    runs = {lr: sweep_run(arm, lr) for lr in rates}
    if not all(map(is_done, runs.values())):
        return None
    return min(runs, key=lambda lr: last_evaluation(folder(runs[lr]))["loss"])


def learning_rate(run: Run) -> float | None:
    """The run's own, or the one with the lowest held-out loss in its arm's sweep; None before that is complete."""
    if run.lr is not None:
        return run.lr
    return _best(run.arm, [tried.lr for tried in sweep(run.arm) if tried.lr is not None])


def step_seconds(run: Run) -> float | None:
    """The calibrated time of one of the run's steps; None without a calibration."""
    record = calibration(run.arm.group)
    if not record.is_file():
        return None
    name = f"{run.arm.timed_as or run.arm.name}-{run.blocks}"
    measured = json.loads(record.read_text())["step_seconds"].get(name)
    return None if measured is None else measured["median"] * run.arm.slower


def steps(run: Run) -> int | None:
    """The steps that the run's budget buys at the calibrated step time; None without a calibration."""
    seconds = step_seconds(run)
    return None if seconds is None else int(run.seconds / seconds)
