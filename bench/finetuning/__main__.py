"""Fine-tunes the models of the pretraining experiments, run after run, and says what came out."""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.documents import keep_figure, rewrite
from bench.finetuning import plan, report, store, tasks, times


def command(run: plan.Run, lr: float, models: Path, task: Path, out: Path) -> list[str]:
    """The `hbert finetune` command of a run."""
    splits = [word for name in ("train", "valid", "test") for word in (f"--{name}", str(task / f"{name}.tsv"))]
    model = models / plan.pretrained(run.model)
    how = plan.TASKS[run.task]
    options = ["--columns", "label", "text", "--batch-size", "64", "--dtype", how.dtype]
    options += ["--epochs", str(how.epochs), "--patience", str(plan.PATIENCE)]
    chosen = ["--lr", f"{lr:g}", "--seeds", str(run.seed), "--out", str(out), "--overwrite"]
    return [sys.executable, "-m", "hbert", "finetune", "--model", str(model), *splits, *options, *chosen]


def execute(run: plan.Run, options: argparse.Namespace, console: Console) -> bool:
    """Does one run; returns whether its record could be kept."""
    lr = run.lr or store.learning_rate(run.task, run.model)
    if lr is None:
        console.print(f"{run.name}: waits for its sweep")
        return False
    if not (options.models / plan.pretrained(run.model) / "model.safetensors").is_file():
        how = f"python -m bench.pretraining run --weights --only {plan.pretrained(run.model)}"
        console.print(f"{run.name}: waits for its model: {how}")
        return False
    out = options.work / run.name
    words = command(run, lr, options.models, options.tasks / run.task, out)
    console.print(f"{run.name}: {' '.join(words[2:])}")
    if subprocess.run(words, check=False).returncode != 0:
        console.print(f"{run.name}: stopped")
        return False
    store.keep(run, out)
    console.print(f"{run.name}: test accuracy {store.record(run)['test']['accuracy']['mean']:.4f}")
    return True


def run_all(there: Sequence[str], options: argparse.Namespace, console: Console) -> bool:
    """Every run of these tasks that is wanted and not done, the sweeps first; returns whether all could be done."""

    def missing(runs: Sequence[plan.Run]) -> list[plan.Run]:
        return [run for run in runs if fnmatch.fnmatch(run.name, options.only) and not store.is_done(run)]

    complete = True
    pairs = [(task, model) for task in there for model in plan.models(task)]
    for task, model in pairs:
        # A sweep grows while its best rate is at an edge.
        while waiting := missing(store.sweep(task, model)):
            if not execute(waiting[0], options, console):
                complete = False
                break
    return all([execute(run, options, console) for run in missing(plan.runs(tuple(there)))]) and complete


def _write_tasks(options: argparse.Namespace, console: Console) -> bool:
    for folder in tasks.write_tasks(options.tasks):
        console.print(str(folder))
    return True


def _run(options: argparse.Namespace, console: Console) -> bool:
    return run_all(_there(options), options, console)


def _time(options: argparse.Namespace, console: Console) -> bool:
    for task in _there(options):
        if any(store.chosen(task, model) for model in plan.models(task)):
            store.keep_times(task, times.measure(task, options.tasks, options.models, console))
    return True


def _show_status(options: argparse.Namespace, console: Console) -> bool:
    there = _there(options)
    sweeps = (run for task in there for model in plan.models(task) for run in store.sweep(task, model))
    for run in (*sweeps, *plan.runs(there)):
        if fnmatch.fnmatch(run.name, options.only):
            console.print(f"{run.name:24} {'done' if store.is_done(run) else 'to do'}")
    return True


def _report(options: argparse.Namespace, console: Console) -> bool:
    found = report.report()
    rewrite(report.PAGE, {"finetuning": found})
    console.print(found)
    made = report.write_page(store.RESULTS / "report")
    for task in plan.TASKS:
        if (drawn := made.with_name(report.figure(task).name)).is_file():
            keep_figure(drawn, report.figure(task))
    console.print(f"written to {made}")
    return True


def _there(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(task for task in plan.TASKS if (options.tasks / task).is_dir())


ACTIONS = {"tasks": _write_tasks, "run": _run, "time": _time, "status": _show_status, "report": _report}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetuning", description=__doc__)
    parser.add_argument("action", choices=tuple(ACTIONS))
    for flag, folder, what in (
        ("--tasks", "runs/tasks", "a folder of train, valid, test.tsv each"),
        ("--models", "runs/experiments", "where main-ARM-SEED are"),
        ("--work", "runs/finetuning", "folder of the runs themselves"),
    ):
        parser.add_argument(flag, type=Path, default=Path(folder), help=f"{what} (default: %(default)s)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs whose name matches, e.g. 'emotion-*'")
    options = parser.parse_args()
    console = Console(soft_wrap=True, markup=False, highlight=False)
    return 0 if ACTIONS[options.action](options, console) else 1


if __name__ == "__main__":
    raise SystemExit(main())
