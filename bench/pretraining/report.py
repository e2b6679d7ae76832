"""The results so far: a report for each set of runs that can be compared, and the paired differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from statistics import mean, stdev

from rich.console import Console

from bench.pretraining import plan, store
from hbert.evaluate.report_command import write_report
from hbert.evaluate.run_folder import Run, read_runs
from hbert.evaluate.summary import markdown

# What is compared with each other -> the runs of the plan.
CHAPTERS: dict[str, Callable[[plan.Run], bool]] = {
    "arms": lambda run: run.arm.group == "arms" and run.name.startswith("main-") and run.seed == 0,
    "seeds": lambda run: run.name.startswith("main-") and run.arm.name in plan.PAIRED and run.seed > 0,
    "blocks-of-128": lambda run: run.blocks == "128",
    "hour": lambda run: run.seconds == plan.HOUR_SECONDS,
    "start": lambda run: run.arm.group == "start",
}
_AXES = ("clock", "steps")


def report(console: Console) -> None:
    """Writes docs/results/pretraining/report/CHAPTER for every chapter that has finished runs, and paired.md.

    The clock is that of the calibration, not the time that a run took beside other load.
    """
    done = [run for run in plan.runs() if store.is_done(run)]
    for chapter, belongs in CHAPTERS.items():
        if chosen := [run for run in done if belongs(run)]:
            console.print(chapter, style="bold")
            out = store.RESULTS / "report" / chapter
            out.mkdir(parents=True, exist_ok=True)
            write_report([_calibrated(run) for run in chosen], out, _AXES)
    table = paired([run for run in done if run.name.startswith("main-") and run.arm.name in plan.PAIRED])
    (store.RESULTS / "report" / "paired.md").write_text(table)
    console.print(table, markup=False)


def _calibrated(run: plan.Run) -> Run:
    (found,) = read_runs([store.folder(run)])
    seconds = store.step_seconds(run)
    assert seconds is not None
    clock = [replace(entry, train_seconds=entry.step * seconds) for entry in found.evaluations]
    label = f"{run.arm.name}: {run.arm.what}" if run.seed == 0 else f"{run.arm.name}, seed {run.seed}"
    return replace(found, label=label, evaluations=clock, info=replace(found.info, step_seconds=seconds))


def paired(runs: list[plan.Run]) -> str:
    """Returns a Markdown table of the differences between arms over the seeds that both have.

    The standard error is that of the mean difference; a win is a difference above two of them.
    """
    accuracy = {(run.arm.name, run.seed): store.last_evaluation(run)["accuracy"] for run in runs}
    rows = []
    for one, other in combinations(dict.fromkeys(run.arm.name for run in runs), 2):
        seeds = [seed for name, seed in accuracy if name == one and (other, seed) in accuracy]
        ours, theirs = ([accuracy[name, seed] for seed in seeds] for name in (one, other))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        error = stdev(differences) / len(seeds) ** 0.5 if len(seeds) > 1 else None
        ratio = f"{mean(ours) / mean(theirs):.2f}"
        shown = "-" if error is None else f"{error:.4f}"
        rows.append([f"{one} - {other}", str(len(seeds)), f"{mean(differences):+.4f}", shown, ratio])
    return markdown(["arms", "seeds", "difference of accuracy", "standard error", "ratio"], rows)
