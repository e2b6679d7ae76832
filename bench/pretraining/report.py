"""The results so far: a report for each set of runs that can be compared, and the paired differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from bench.documents import DOCS, rewrite
from bench.pretraining import plan, store, tables
from hbert.evaluate.report_command import write_report
from hbert.evaluate.run_folder import Run, read_runs

# What is compared with each other -> the runs of the plan.
CHAPTERS: dict[str, Callable[[plan.Run], bool]] = {
    "arms": lambda run: run.arm.group == "arms" and run.name.startswith("main-") and run.seed == 0,
    "seeds": lambda run: run.name.startswith("main-") and run.seed > 0,
    "blocks-of-128": lambda run: run.blocks == "128",
    "hour": lambda run: run.seconds == plan.HOUR_SECONDS,
    "start": lambda run: run.arm.group == "start",
}
_AXES = ("clock", "steps")
PAGE = DOCS / "results-pretraining.md"


def report(console: Console) -> None:
    """Writes docs/results/pretraining/report/CHAPTER for every chapter that has finished runs, and the page's tables.

    The clock is that of the calibration, not the time that a run took beside other load.
    """
    done = finished()
    blocks = {"pretraining-sweeps": tables.sweeps()}
    for chapter, belongs in CHAPTERS.items():
        if chosen := [run for run in done if belongs(run)]:
            console.print(chapter, style="bold")
            out = store.RESULTS / "report" / chapter
            out.mkdir(parents=True, exist_ok=True)
            rows = write_report([_calibrated(run) for run in chosen], out, _AXES)
            blocks[f"pretraining-{chapter}"] = tables.outcomes(chosen, rows)
    blocks["pretraining-paired"] = tables.paired(
        [run for run in done if run.name.startswith("main-") and run.arm.name in plan.PAIRED]
    )
    groups = {arm.group for arm in plan.ARMS.values() if store.calibration(arm.group).is_file()}
    blocks |= {f"pretraining-steps-{group}": tables.step_times(group) for group in groups}
    rewrite(PAGE, blocks)
    console.print(blocks["pretraining-paired"], markup=False)


def finished() -> list[plan.Run]:
    """The runs that have a record, sweeps left out; the highest held-out accuracy first, in legends too."""
    accuracy = {run: store.last_evaluation(store.folder(run))["accuracy"] for run in plan.runs() if store.is_done(run)}
    return sorted(accuracy, key=lambda run: -accuracy[run])


def _calibrated(run: plan.Run) -> Run:
    (found,) = read_runs([store.folder(run)])
    seconds = store.step_seconds(run)
    assert seconds is not None
    clock = [replace(entry, train_seconds=entry.step * seconds) for entry in found.evaluations]
    label = f"{run.arm.name}: {run.arm.what}" if run.seed == 0 else f"{run.arm.name}, seed {run.seed}"
    return replace(found, label=label, evaluations=clock, info=replace(found.info, step_seconds=seconds))
