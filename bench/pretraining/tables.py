"""The tables of docs/results-pretraining.md, from the records of finished runs and the calibration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, stdev

from bench.pretraining import plan, store
from hbert.data.ngram import NgramMarks
from hbert.evaluate.marks import DRAWN
from hbert.evaluate.run_folder import Evaluation, Run
from hbert.evaluate.same_input import SameInputMarks
from hbert.evaluate.summary import Row, duration, markdown, source_table

# Number of seeds -> how many standard errors Student's interval of 95% reaches: degrees of freedom, one fewer.
_STUDENT = {2: 12.706, 3: 4.303}


def outcomes(runs: Sequence[plan.Run], rows: Sequence[Row], escapes: Sequence[Evaluation | None]) -> str:
    """One line for each run, on the calibrated clock.

    Args:
        rows: the report's.
        escapes: where a run was above the left bigram of its own inputs for the first time.
    """
    lines = [_outcome(*of_one) for of_one in zip(runs, rows, escapes, strict=True)]
    columns = [
        "arm",
        "seed",
        "learning rate",
        "steps",
        "clock",
        "held-out accuracy",
        "loss, nats",
        "passed the left-bigram mark",
        "of its own inputs",
    ]
    return markdown(columns, lines)


def _passed(step: int | None, seconds: float | None) -> str:
    return "-" if step is None else f"step {step:,}, {duration(seconds)}"


def _outcome(run: plan.Run, row: Row, escape: Evaluation | None) -> list[str]:
    return [
        f"{run.arm.name}: {run.arm.what}",
        str(run.seed),
        f"{store.trained_with(run)['lr']:g}",
        f"{row.step:,}",
        duration(row.clock_seconds),
        f"{row.accuracy:.4f}",
        f"{row.loss:.3f}",
        _passed(row.escape_step, row.escape_seconds),
        _passed(escape.step, escape.train_seconds) if escape else "-",
    ]


def paired(runs: Sequence[plan.Run]) -> str:
    """The differences between arms over the seeds that both have.

    The standard error is that of the mean difference, over seeds alone: all see the same held-out text. The interval is
    Student's, of 95%, for so few seeds: 4.3 standard errors of three, 12.7 of two. Where it holds 0, nothing is shown.
    """
    accuracy = {(run.arm.name, run.seed): store.last_evaluation(store.folder(run))["accuracy"] for run in runs}
    rows = []
    for one, other in combinations(dict.fromkeys(run.arm.name for run in runs), 2):
        seeds = [seed for name, seed in accuracy if name == one and (other, seed) in accuracy]
        if not seeds:
            continue
        ours, theirs = ([accuracy[name, seed] for seed in seeds] for name in (one, other))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        ratio = f"{mean(ours) / mean(theirs):.2f}"
        spread = _spread(differences) if len(seeds) > 1 else ("-", "-")
        rows.append([f"{one} - {other}", str(len(seeds)), f"{mean(differences):+.4f}", *spread, ratio])
    return markdown(["arms", "seeds", "difference of accuracy", "standard error", "95% interval", "ratio"], rows)


def _spread(differences: Sequence[float]) -> tuple[str, str]:
    centre, error = mean(differences), stdev(differences) / len(differences) ** 0.5
    reach = error * _STUDENT[len(differences)]
    return f"{error:.4f}", f"[{centre - reach:+.4f}, {centre + reach:+.4f}]"


def brief(runs: Sequence[plan.Run], marks: SameInputMarks) -> str:
    """The accuracy with seed 0 of layers without and with the short convolution; the best one is bold.

    The first line is what needs no layers: the accuracy of a model without context on the same inputs.
    """
    first = {run.arm.name: run for run in runs if run.name == f"main-{run.arm.name}-0"}
    accuracy = {name: store.last_evaluation(store.folder(run))["accuracy"] for name, run in first.items()}
    cells = {name: f"{found:.3f}" for name, found in accuracy.items()}
    shown = {arm for _, *pair in plan.IN_BRIEF for arm in pair if arm in cells}
    if best := max(shown, key=accuracy.__getitem__, default=None):
        cells[best] = f"**{cells[best]}**"
    lines = [["no context: repeat the input, at [MASK] the commonest token", f"{marks.context_free:.3f}", ""]]
    lines += [[what, *(cells.get(arm, "") for arm in pair)] for what, *pair in plan.IN_BRIEF]
    return markdown(["", "as it is", "with the short convolution"], lines)


def sources(runs: Sequence[Run]) -> str:
    """The last accuracy of each run on each source of the held-out text, and how many predictions that is of."""
    columns, rows = source_table(runs)
    counts = {name: found["num_masked"] for run in runs for name, found in run.last.per_source.items()}
    return markdown([*columns, "predictions"], [[*row, f"{counts[row[0]]:,}"] for row in rows])


def marks(found: Mapping[str, NgramMarks]) -> str:
    """The accuracy of counting models on the held-out text of each group of arms."""
    rows = [
        [group, *(f"{getattr(one, name):.4f}" for name in DRAWN), f"{one.predictions:,}"]
        for group, one in found.items()
    ]
    return markdown(["group", *DRAWN.values(), "predictions"], rows)


def same_input(found: Mapping[tuple[str, str], SameInputMarks]) -> str:
    """What counting models have right on the inputs of the evaluations, for each group of arms and length of blocks."""
    columns = ["group", "blocks of", "no context", "its loss, nats", "left bigram", "trigram", "unigram, at [MASK]"]
    rows = [
        [
            group,
            blocks,
            f"{one.context_free:.4f}",
            f"{one.loss:.3f}",
            *(f"{share:.4f}" for share in (one.left_bigram, one.trigram, one.unigram)),
            f"{one.predictions:,}",
        ]
        for (group, blocks), one in found.items()
    ]
    return markdown([*columns, "predictions"], rows)


def sweeps() -> str:
    """Loss / accuracy of every learning rate that was tried, a line for each arm; the chosen one is bold."""
    tried = {arm: [run for run in store.sweep(arm) if store.is_done(run)] for arm in plan.ARMS.values()}
    rates = sorted({run.lr for runs in tried.values() for run in runs if run.lr is not None})
    lines = []
    for arm, runs in tried.items():
        found = {run.lr: store.last_evaluation(store.folder(run)) for run in runs}
        best = min(found, key=lambda lr: found[lr]["loss"], default=None)
        cells = {lr: f"{last['loss']:.3f} / {last['accuracy']:.4f}" for lr, last in found.items()}
        shown = [f"**{cells[lr]}**" if lr == best else cells.get(lr, "") for lr in rates]
        lines += [[arm.name, *shown]] if runs else []
    return markdown(["arm", *(f"{rate:g}" for rate in rates)], lines)


def step_times(group: str) -> str:
    """The calibrated time of a step of each arm of a group, in milliseconds, a column for each block length."""
    times = json.loads(store.calibration(group).read_text())["step_seconds"]
    arms = [arm for arm in plan.ARMS.values() if arm.group == group and arm.timed_as is None]
    lines = []
    for arm in arms:
        measured = [times.get(f"{arm.name}-{blocks}") for blocks in plan.BLOCKS]
        cells = ["" if one is None else f"{1e3 * one['median']:.0f}" for one in measured]
        lines.append([f"{arm.name}: {arm.what}", *cells])
    return markdown(["arm", *(f"blocks of {blocks}, ms" for blocks in plan.BLOCKS)], lines)
