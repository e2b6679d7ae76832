"""Calibrates all arms, runs what is not done yet, says what is, or draws and tabulates it."""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from bench.pretraining import calibrate, minilm, plan, report, store


def command(run: plan.Run, out: Path) -> list[str]:
    """The `hbert pretrain` command of a run whose calibration and learning rate are known."""
    lr, steps = store.learning_rate(run), store.steps(run)
    flags = [*run.arm.common, *run.arm.flags, *plan.BLOCKS[run.blocks], "--lr", f"{lr:g}", "--seed", str(run.seed)]
    flags += ["--max-steps", str(steps), "--out", str(out)]
    resume = ["--resume"] if (out / "run.json").is_file() else []
    return [sys.executable, "-m", "hbert", "pretrain", *flags, *resume]


def execute(run: plan.Run, work: Path, console: Console) -> bool:
    """Runs or goes on with one run, before it those of its sweep; returns whether its record could be kept."""
    while waiting := [tried for tried in store.sweep(run.arm) if run.lr is None and not store.is_done(tried)]:
        if not execute(waiting[0], work, console):
            return False
    if store.steps(run) is None:
        console.print(f"{run.name}: {run.arm.group} are not calibrated")
        return False
    if plan.MINILM in run.arm.flags:
        minilm.unpack(Path(plan.MINILM))
    out = work / run.name
    console.print(f"{run.name}: {' '.join(command(run, out)[2:])}")
    if train(command(run, out)) != 0:
        console.print(f"{run.name}: stopped")
        return False
    if not store.is_done(run):
        store.keep(run, out)
    evaluation = store.last_evaluation(out)
    console.print(f"{run.name}: loss {evaluation['loss']:.4f}, accuracy {evaluation['accuracy']:.4f}")
    return True


def train(words: list[str]) -> int:
    """Returns the exit status of a command. Ctrl-C, which it gets, too, waits until it has written its checkpoint."""
    process = subprocess.Popen(words)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.pretraining", description=__doc__)
    parser.add_argument("action", choices=("calibrate", "run", "status", "report"))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs whose name matches, e.g. 'main-*'")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/experiments"),
        help="where the runs themselves go (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", action="store_true", help="also runs that have a record, but no model under --work: train it again"
    )
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    if options.action == "calibrate":
        for group in sorted({arm.group for arm in plan.ARMS.values()}):
            if store.calibration(group).is_file():
                console.print(f"{group}: calibrated already; to do it again, remove {store.calibration(group)}")
            else:
                calibrate.calibrate(group, console)
        return 0
    if options.action == "report":
        report.report(console)
        return 0
    wanted = [run for run in plan.runs() if fnmatch.fnmatch(run.name, options.only)]
    if options.action == "status":
        for run in [*(tried for arm in plan.ARMS.values() for tried in store.sweep(arm)), *wanted]:
            state = "done" if store.is_done(run) else "to do"
            console.print(f"{run.name:24} {state:6} {store.steps(run) or '-'} steps")
        return 0
    if options.weights:
        missing = [run for run in wanted if not (options.work / run.name / "model.safetensors").is_file()]
    else:
        missing = [run for run in wanted if not store.is_done(run)]
    outcomes = [execute(run, options.work, console) for run in missing]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
